"""``grpc.health.v1`` for ``""``, ``avap.DefinitionEngine``, ``liveness`` and ``avap.freshness``.

Two things differ from the servicer of grpcio-health-checking. Watches can be ended: one does not end by itself, and a
server that waits for its calls in flight would wait for its whole grace period. And a change of state is passed on to
`_WOKEN_AT_ONCE` watches in one iteration of the event loop, so that ten thousand watches do not delay other calls.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from definition_server.data_plane.services import SERVICE

LIVENESS = "liveness"
"""SERVING for as long as the worker answers at all, with a catalogue or without.

For kubelet's liveness and startup probes, which restart a container that is NOT_SERVING. A container that waits for its
database, or drains, must not be restarted for that.
"""

FRESHNESS = "avap.freshness"
"""SERVING while what is served is known to be up to date. For operators and monitoring, never for a load balancer: a
stale answer is better than none."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_LAST_WRITE_SECONDS = 1.0
_WOKEN_AT_ONCE = 2
"""Watches that are informed in one iteration of the loop: 60 to 100 µs. Ten thousand take half a second."""


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking has no types
    """The servicer."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {}
        self._waiting: dict[asyncio.Future[None], tuple[str, int]] = {}
        """Watches that wait for a change → service, and the state that they have sent."""
        self._writing: set[asyncio.Task[Any]] = set()
        """Tasks of watches that are sending a state."""
        self._to_wake: deque[asyncio.Future[None]] = deque()
        self._waking = False
        self._ending = False

    async def report(self, serving: bool) -> None:
        """Answer SERVING or NOT_SERVING from now on; watches get it soon. Liveness is SERVING from the first call."""
        self._states[LIVENESS] = _SERVING
        self._states.setdefault(FRESHNESS, _NOT_SERVING)
        for service in ("", SERVICE):
            self._states[service] = _SERVING if serving else _NOT_SERVING
        self._wake_all()

    async def report_freshness(self, fresh: bool) -> None:
        """Answer for `FRESHNESS` from now on; watches get it soon."""
        self._states[FRESHNESS] = _SERVING if fresh else _NOT_SERVING
        self._wake_all()

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """The state of every service."""
        states = {name: health_pb2.HealthCheckResponse(status=state) for name, state in self._states.items()}
        return health_pb2.HealthListResponse(statuses=states)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """The state of ``request.service``, or NOT_FOUND."""
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "No such service")
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802 - gRPC's name
        """Stream the state of ``request.service`` until the client leaves or `end_watches`."""
        service, sent = request.service, -1
        while True:
            state = self._states.get(service, _UNKNOWN)
            if state != sent:
                sent = state
                await self._write(context, health_pb2.HealthCheckResponse(status=state))
            elif self._ending:
                return
            else:
                await self._change(service, sent)

    def end_watches(self) -> None:
        """End every watch with status OK, soon and from now on. One whose client does not read is cancelled."""
        self._ending = True
        self._wake_all()
        for task in self._writing:
            asyncio.get_running_loop().call_later(_LAST_WRITE_SECONDS, self._cancel, task)

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        if task in self._writing:
            task.cancel()

    async def _write(self, context: Any, message: health_pb2.HealthCheckResponse) -> None:
        """Send ``message``. A write that has begun is finished, although the watch ends during it: C-core never
        completes a call whose write was cancelled, and a stop would wait for its whole grace period."""
        task = asyncio.current_task()
        assert task is not None
        writing = asyncio.ensure_future(context.write(message))
        self._writing.add(task)
        try:
            await asyncio.shield(writing)
        finally:
            self._writing.discard(task)
            del task  # its exception would hold this frame, and the frame the task: garbage until a collection
            if not writing.done():
                await asyncio.wait((writing,), timeout=0 if self._ending else _LAST_WRITE_SECONDS)
                writing.cancel()

    async def _change(self, service: str, sent: int) -> None:
        """Wait until the state of ``service`` may be another than ``sent``, or watches end."""
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
