"""``grpc.health.v1`` for ``""``, ``avap.DefinitionEngine`` and ``liveness``, with watches that do not delay a drain."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from grpc_health.v1 import health, health_pb2

from definition_server.data_plane.services import SERVICE

LIVENESS = "liveness"
"""SERVING for as long as the worker answers at all, with a catalogue or without.

For kubelet's liveness and startup probes, which restart a container that is NOT_SERVING. A container that waits for its
database, or drains, must not be restarted for that.
"""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_LAST_WRITE_SECONDS = 1.0
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking has no types
    """The servicer of grpcio-health-checking, with watches that can be ended.

    A ``Watch`` does not end by itself: a server that waits for its calls in flight would wait for its whole grace
    period if any client watches.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ending = asyncio.Event()

    async def report(self, serving: bool) -> None:
        """Answer SERVING or NOT_SERVING from now on, to watches at once. Liveness is SERVING from the first call on."""
        await self.set(LIVENESS, _SERVING)
        for service in ("", SERVICE):
            await self.set(service, _SERVING if serving else _NOT_SERVING)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802 - gRPC's name
        """Stream the state of ``request.service`` until the client leaves or `end_watches`."""
        whole = _WholeWrites(context)
        watching = asyncio.ensure_future(_run(super().Watch(request, whole)))
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait((watching, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (watching, ending):
                task.cancel()
            await asyncio.gather(watching, ending, return_exceptions=True)
            await whole.finish()

    def end_watches(self) -> None:
        """End every watch with status OK, now and from now on."""
        self._ending.set()


async def _run(watch: Coroutine[Any, Any, None]) -> None:
    await watch


class _WholeWrites:
    """A context that finishes a write once begun, although the watch ends during it.

    C-core never completes a call whose write was cancelled: a stop would wait for its whole grace period.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._writing: asyncio.Future[None] | None = None

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        """See ``grpc.aio.ServicerContext``."""
        self._writing = asyncio.ensure_future(self._context.write(message))
        await asyncio.shield(self._writing)

    async def finish(self) -> None:
        """Wait for a write under way, but not for ever: the client may have stopped reading."""
        if self._writing is not None and not self._writing.done():
            await asyncio.wait((self._writing,), timeout=_LAST_WRITE_SECONDS)
            self._writing.cancel()
