"""Connects the control socket with the service of the operators' commands, and with the parts of the master that they
change.

The engine and protobuf are large. So the engine is imported only if the settings name a control socket, and protobuf is
imported only when the socket opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from definition_server.catalog.gate import Held
from definition_server.catalog.signing import Signer
from definition_server.control_plane.publication_policy import PublicationPolicy
from definition_server.control_plane.publications import Publications
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.start_notices import NOT_STORED
from definition_server.control_plane.supervisor import Supervisor
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_loop import SyncLoop
from definition_server.observability.status import ServiceStatus
from definition_server.settings import Settings

if TYPE_CHECKING:
    from definition_server.control_plane.control_server import ControlServer
    from grpc_h2 import MethodHandler


class OperatorAccess:
    """The control socket of a master, if it has one."""

    def __init__(
        self,
        settings: Settings,
        synchronizer: Synchronizer,
        sync_loop: SyncLoop,
        publisher: Publisher,
        supervisor: Supervisor,
        *,
        policy: PublicationPolicy | None,
        signer: Callable[[], Signer | None],
        status: Callable[[], ServiceStatus],
        held_commands: Callable[[], Sequence[Held]],
    ) -> None:
        """
        Args:
            settings: Have the path of the socket.
            synchronizer: Has the catalogue that commands change.
            sync_loop: Runs a cycle if a command requests one.
            publisher: Has the current publication.
            supervisor: Rolls the workers.
            policy: The policy file; None if there is none.
            signer: The present key.
            status: Returns the status that the command ``status`` shows.
            held_commands: The rows that the gate holds.
        """
        self._settings = settings
        self._synchronizer = synchronizer
        self._sync_loop = sync_loop
        self._publisher = publisher
        self._supervisor = supervisor
        self._policy = policy
        self._signer = signer
        self._status = status
        self._held_commands = held_commands
        self._server = self._make_server()

    @property
    def state(self) -> str:
        """See `ServiceStatus.control_socket`."""
        return "off" if self._server is None else self._server.state

    @property
    def offered(self) -> bool:
        """Whether the settings name a control socket."""
        return self._server is not None

    async def run(self) -> None:
        """Keep the socket open. May be called only if the socket is `offered`. Never returns."""
        assert self._server is not None
        await self._server.run()

    async def close(self) -> None:
        """Remove the socket's file and end the calls."""
        if self._server is not None:
            await self._server.close()

    def _make_server(self) -> ControlServer | None:
        path = self._settings.control_path()
        if path is None:
            return None
        from definition_server.control_plane.control_server import ControlServer

        return ControlServer(path, self._handlers, workers=lambda: self._supervisor.worker_pids)

    def _handlers(self) -> Mapping[str, MethodHandler]:
        from definition_server.control_plane.control_service import ControlService

        publications = Publications(
            self._synchronizer.catalogue,
            signer=self._signer,
            sync_soon=self._sync_loop.sync_soon,
        )
        service = ControlService(
            publications,
            self._publisher,
            self._supervisor,
            self._synchronizer.state,
            status=self._status,
            notices=self._notices,
            sync=self._sync_loop.sync_now,
            seconds_to_next=lambda: self._sync_loop.seconds_to_next,
            held_commands=self._held_commands,
        )
        return service.handlers()

    def _notices(self) -> list[str]:
        """Sentences for the operator that ``status`` does not contain."""
        error = self._synchronizer.state.store_error
        notices = [] if error is None else [f"the last-known-good snapshot is not stored: {error}"]
        if self._settings.snapshot_dir is None:
            notices.append(f"nothing is stored, because SNAPSHOT_DIR is not set: {NOT_STORED}")
        if self._policy is not None and self._policy.problem is not None:
            notices.append(f"PUBLICATION_POLICY is not usable; the previous policy applies: {self._policy.problem}")
        return notices
