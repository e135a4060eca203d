"""Serves the operator's commands on a Unix socket.

If the socket cannot be opened (a full or read-only disk, another instance), the reason is logged with a remedy, and the
attempt is repeated. Meanwhile the server serves without the socket. A socket whose file was removed is opened again
too. The cost of the clients of the socket is limited, because other programs of the same account are not trusted: few
connections, small requests, and a deadline for each. The engine serves these clients in time slices, as it serves
clients of the gRPC port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from definition_server.control_plane.control_socket import ControlSocket, SocketUnusable, open_socket, stranger
from definition_server.control_plane.disk import on_disk
from definition_server.observability.logs import get_logger
from grpc_h2 import Limits, MethodHandler, Server

log = get_logger(__name__)

SERVICE = "avap.control.v1.Control"
MAX_REQUEST = 16 * 1024
"""The most octets of a request. A request holds at most two versions."""
MAX_CONNECTIONS = 32
MAX_CALLS = 16
_MAX_HELD = 4 * 1024 * 1024
"""The most octets that are buffered for all clients together."""
_CHECK_SECONDS = 5.0
"""Seconds between two checks of the socket's file, or two attempts to make the file."""
_DISK_SECONDS = 10.0
"""Seconds for which an attempt is awaited, because a disk may hang."""
_STOP_SECONDS = 0.2


class ControlServer:
    """The socket and the server on it."""

    def __init__(
        self,
        path: Path,
        handlers: Callable[[], Mapping[str, MethodHandler]],
        workers: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """
        Args:
            path: The path of the socket.
            handlers: The methods of `SERVICE`; called only when the socket is open, because the call imports their
                module.
            workers: Process ids of the workers, which are refused.
        """
        self._path = path
        self._workers = workers
        self._handlers = handlers
        self._socket: ControlSocket | None = None
        self._server: Server | None = None
        self._serves = False
        self._opening: asyncio.Future[ControlSocket] | None = None
        self.problem: str | None = "it is not open yet"
        """The reason why there is no socket; None if there is one."""

    @property
    def state(self) -> str:
        """See `ServiceStatus.control_socket`."""
        return "open" if self.problem is None else "unavailable"

    async def run(self) -> None:
        """Keep the socket open. Never returns."""
        while True:
            try:
                await self._ensure()
            except Exception as bug:  # the master continues: clients' calls matter more than commands
                log.exception("Unexpected failure of the control socket", exc_info=bug)
                self.problem = f"unexpected {type(bug).__name__}"
            await asyncio.sleep(_CHECK_SECONDS)

    async def close(self) -> None:
        """Remove the file and end the calls."""
        await self._stop()
        if self._opening is not None:
            self._opening.add_done_callback(_discard)
        if self._socket is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(on_disk(self._socket.remove), 1.0)
            self._socket = None

    async def _ensure(self) -> None:
        """Open the socket unless it is open."""
        try:
            async with asyncio.timeout(_DISK_SECONDS):
                opened = await self._open()
        except SocketUnusable as error:
            self._report(str(error), error.remedy)
            return
        except TimeoutError:
            self._report(f"{self._path}: the disk does not answer", "set CONTROL_SOCKET to a path on another disk")
            return
        except RuntimeError as fault:
            if self._socket is None:  # an open socket stays open, and is checked again later
                self._report(f"no thread can be started: {fault}", "raise the limit of processes")
            return
        if opened is self._socket:
            if self._serves:
                self.problem = None
            return
        await self._stop()
        self._socket = None
        try:
            await self._start(opened)
        except BaseException as error:
            # A socket that nothing serves would look open, and would prevent that another is opened.
            opened.remove()
            opened.listening.close()
            if not isinstance(error, OSError):
                raise
            unusable = SocketUnusable.because_of(error, self._path)
            self._report(str(unusable), unusable.remedy)
            return
        self._socket = opened
        self.problem = None
        log.info("Control socket open", path=str(self._path.absolute()))

    async def _open(self) -> ControlSocket:
        """The present socket if its file is in place, otherwise a new one. At most one thread runs this, even if the
        disk hangs.

        Raises:
            SocketUnusable: if it cannot be opened.
        """
        if self._opening is None:
            held = self._socket
            self._opening = on_disk(lambda: held if held is not None and held.in_place else open_socket(self._path))
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        finally:
            if opening.done():
                self._opening = None

    async def _start(self, opened: ControlSocket) -> None:
        limits = Limits(
            max_message=MAX_REQUEST, max_buffered=4 * MAX_REQUEST, max_unread=16 * MAX_REQUEST, max_held=_MAX_HELD
        )
        self._server = server = Server(
            limits=limits, max_connections=MAX_CONNECTIONS, max_concurrent_calls=MAX_CALLS, first_call_timeout=10.0
        )
        server.add_registered_method_handlers(SERVICE, self._handlers())
        server.add_listener(opened.listening, objection=lambda peer: stranger(peer, self._workers()))
        await server.start()
        self._serves = True

    async def _stop(self) -> None:
        self._serves = False
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(_STOP_SECONDS)

    def _report(self, problem: str, remedy: str) -> None:
        if problem != self.problem:
            log.warning("No control socket; the server serves without it", error=problem, remedy=remedy)
        self.problem = problem


def _discard(opening: asyncio.Future[ControlSocket]) -> None:
    """Close a socket that was opened too late. (If it is the present socket, it is closed already; closing it twice
    does no harm.)
    """
    if not opening.cancelled() and opening.exception() is None:
        late = opening.result()
        late.remove()
        late.listening.close()
