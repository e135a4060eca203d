"""``grpc.health.v1`` for ``""``, ``avap.DefinitionEngine``, ``liveness`` and ``avap.freshness``.

Two things differ from the servicer of grpcio-health-checking. First, the server can end watches. A watch does not end
by itself, so a server that waits for its calls in flight would wait for its whole grace period. Second, a change of
state is passed on to `_WOKEN_AT_ONCE` watches in one iteration of the event loop, so that ten thousand watches do not
delay other calls.

Requests and answers are octets: each message has one field, so no protobuf library is needed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from definition_server.catalog.wire import VARINT, WireError, field
from definition_server.data_plane.requests import check_empty, text_of
from definition_server.data_plane.services import SERVICE
from grpc_h2 import MethodHandler, StatusCode

HEALTH_SERVICE = "grpc.health.v1.Health"

LIVENESS = "liveness"
"""The service that is SERVING as long as the worker answers at all, with or without a catalogue.

It is for the kubelet's liveness and startup probes, which restart a container that is NOT_SERVING. A container that
waits for its database or drains must not be restarted."""

FRESHNESS = "avap.freshness"
"""The service that is SERVING while the served catalogue is known to be up to date. It is for operators and monitoring,
never for a load balancer, because a stale answer is better than none."""

_SERVING, _NOT_SERVING, _UNKNOWN = 1, 2, 3
"""Values of ``HealthCheckResponse.ServingStatus``."""
_STATUS = 1
"""The number of the only field of ``HealthCheckResponse``."""
_STATUSES, _KEY, _VALUE = 1, 1, 2
"""The field numbers of the map in ``HealthListResponse``, and of the fields of an entry."""
_LAST_WRITE_SECONDS = 1.0
_WOKEN_AT_ONCE = 2
"""Watches that are notified in one iteration of the loop, in 60 to 100 µs. Notifying ten thousand watches takes half a
second."""


class Refusals(NamedTuple):
    """The status codes with which the service refuses calls, as a transport's ``abort`` takes them."""

    not_found: Any = StatusCode.NOT_FOUND
    invalid_argument: Any = StatusCode.INVALID_ARGUMENT


_BY_NUMBER = Refusals()
"""The status codes in the form that `grpc_h2` takes."""


class Health:
    """The service, for both transports."""

    def __init__(self, refusals: Refusals = _BY_NUMBER) -> None:
        self._refusals = refusals
        self._states: dict[str, int] = {}
        self._waiting: dict[asyncio.Future[None], tuple[str, int]] = {}
        """Each watch that waits for a change → its service, and the state that it has sent."""
        self._writing: set[asyncio.Task[Any]] = set()
        """Tasks of watches that are sending a state."""
        self._to_wake: deque[asyncio.Future[None]] = deque()
        self._waking = False
        self._ending = False

    async def report(self, serving: bool) -> None:
        """Answer SERVING or NOT_SERVING from now on; watches are notified soon. Liveness is SERVING from the first
        call.
        """
        self._states[LIVENESS] = _SERVING
        self._states.setdefault(FRESHNESS, _NOT_SERVING)
        for service in ("", SERVICE):
            self._states[service] = _SERVING if serving else _NOT_SERVING
        self._wake_all()

    async def report_freshness(self, fresh: bool) -> None:
        """Set the state of `FRESHNESS` from now on; watches are notified soon."""
        self._states[FRESHNESS] = _SERVING if fresh else _NOT_SERVING
        self._wake_all()

    def handlers(self) -> Mapping[str, MethodHandler]:
        """Method → handler, from request octets to answer octets, on a ``grpc.aio.Server`` or `grpc_h2.Server`."""
        return {
            "Check": MethodHandler.unary(self.check, bytes, bytes),
            "List": MethodHandler.unary(self.list_states, bytes, bytes),
            "Watch": MethodHandler.streaming(self.watch, bytes, bytes),
        }

    async def list_states(self, request: bytes, context: Any) -> bytes:
        """The state of every service."""
        try:
            check_empty(request)
        except WireError as error:
            await context.abort(self._refusals.invalid_argument, str(error))
        return b"".join(
            field(_STATUSES, field(_KEY, name.encode()) + field(_VALUE, _response(state)))
            for name, state in self._states.items()
        )

    async def check(self, request: bytes, context: Any) -> bytes:
        """The state of the requested service, or NOT_FOUND."""
        state = self._states.get(await self._service(request, context))
        if state is None:
            await context.abort(self._refusals.not_found, "No such service")
            raise LookupError(request)  # not reached: `abort` raises
        return _response(state)

    async def watch(self, request: bytes, context: Any) -> None:
        """Stream the state of the requested service until the client disconnects or `end_watches` is called."""
        service, sent = await self._service(request, context), -1
        while True:
            state = self._states.get(service, _UNKNOWN)
            if state != sent:
                sent = state
                await self._write(context, _response(state))
            elif self._ending:
                return
            else:
                await self._change(service, sent)

    async def _service(self, request: bytes, context: Any) -> str:
        """The service that ``request`` names; a request that names none correctly is refused."""
        try:
            return text_of(request).decode()
        except WireError as error:
            await context.abort(self._refusals.invalid_argument, str(error))
            raise  # not reached: `abort` raises

    def end_watches(self) -> None:
        """Let every watch end soon with status OK, also watches that begin later. A watch whose client does not read is
        cancelled.
        """
        self._ending = True
        self._wake_all()
        for task in self._writing:
            asyncio.get_running_loop().call_later(_LAST_WRITE_SECONDS, self._cancel, task)

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        if task in self._writing:
            task.cancel()

    async def _write(self, context: Any, message: bytes) -> None:
        """Send ``message``. A write that has begun is finished even if the watch ends meanwhile: C-core never completes
        a call whose write was cancelled, and a stop would then wait for its whole grace period."""
        task = asyncio.current_task()
        assert task is not None
        writing = asyncio.ensure_future(context.write(message))
        self._writing.add(task)
        try:
            await asyncio.shield(writing)
        finally:
            self._writing.discard(task)
            del task  # the exception refers to this frame, and the frame to the task: a reference cycle
            if not writing.done():
                await asyncio.wait((writing,), timeout=0 if self._ending else _LAST_WRITE_SECONDS)
                writing.cancel()

    async def _change(self, service: str, sent: int) -> None:
        """Wait until the state of ``service`` may differ from ``sent``, or watches end."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[waiting] = (service, sent)
        try:
            await waiting
        finally:
            self._waiting.pop(waiting, None)

    def _wake_all(self) -> None:
        """Wake every watch whose state has changed, a few in each iteration of the loop."""
        self._to_wake = deque(self._waiting)
        if self._to_wake and not self._waking:
            self._waking = True
            self._wake_some()

    def _wake_some(self) -> None:
        woken = 0
        while self._to_wake and woken < _WOKEN_AT_ONCE:
            waiting = self._to_wake.popleft()
            service, sent = self._waiting.get(waiting, ("", -1))
            if not waiting.done() and (self._ending or self._states.get(service, _UNKNOWN) != sent):
                waiting.set_result(None)
                woken += 1
        self._waking = bool(self._to_wake)
        if self._waking:
            asyncio.get_running_loop().call_soon(self._wake_some)


def _response(state: int) -> bytes:
    """A ``HealthCheckResponse``."""
    return bytes((_STATUS << 3 | VARINT, state))
