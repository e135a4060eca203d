"""One worker process, seen from the master: it is started by ``exec``, controlled over a socket, and reaped."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable

from definition_server.control_plane.publisher import Publication
from definition_server.environment import inherited_environment
from definition_server.ipc.channel import Channel, ChannelClosed
from definition_server.ipc.messages import Certificate, Configure, Drain, Keys, KeysUsed, MessageError, Publish, Ready
from definition_server.ipc.stats import Slot, StatsPage
from definition_server.jail.confinement import Extent, extent_of
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

# The variables that a Python process and gRPC's C-core need. A worker gets no others: no DATABASE_URL, no key.
_ENVIRONMENT_NAMES = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV")
_ENVIRONMENT_PREFIXES = ("LC_", "LD_", "PYTHON", "GRPC_", "COVERAGE_")
_QUIET = {"GRPC_VERBOSITY": "ERROR"}
"""Otherwise C-core writes every GOAWAY to stderr, in lines that are not JSON. An operator's own value wins."""

_SEND_AGAIN_SECONDS = 10.0


def _environment() -> dict[str, str]:
    """The environment of a worker.

    Without the entries of ``PYTHONPATH`` that name a place by the working directory: a relative path, or nothing.
    """
    environment = _QUIET | inherited_environment(_ENVIRONMENT_NAMES, _ENVIRONMENT_PREFIXES)
    path = environment.pop("PYTHONPATH", "")
    if fixed := [entry for entry in path.split(os.pathsep) if entry.startswith("/")]:
        environment["PYTHONPATH"] = os.pathsep.join(fixed)
    return environment


class WorkerProcess:
    """A running worker.

    ``ready`` is set once it serves; ``generation`` is the snapshot it last reported; ``ended`` is done when the process
    has been reaped, with its exit code (negative for a signal).
    """

    def __init__(
        self,
        number: int,
        process: Process,
        channel: Channel,
        slot: Slot,
        on_keys_used: Callable[[tuple[str, ...]], None] = lambda _: None,
    ) -> None:
        self.number = number
        self._on_keys_used = on_keys_used
        self.slot = slot
        self.started = asyncio.get_running_loop().time()
        self.ready = asyncio.Event()
        self.generation = 0
        self.jail = Extent.NONE
        """As the worker reports it: a hostile one may lie about itself."""
        self.draining = False
        self.ended: asyncio.Task[int] = asyncio.create_task(self._reap())
        self._process = process
        self._channel = channel
        self._sent_generation = 0
        self._sent_at = 0.0
        self._sent_keys: Keys | None = None
        self._sent_certificate: Certificate | None = None
        asyncio.get_running_loop().add_reader(channel.fileno(), self._receive)

    @classmethod
    async def start(
        cls,
        number: int,
        slot_number: int,
        page: StatsPage,
        config: Configure,
        listener: socket.socket | None = None,
        on_keys_used: Callable[[tuple[str, ...]], None] = lambda _: None,
    ) -> WorkerProcess:
        """Start worker ``number`` on stats slot ``slot_number``, with the socket to accept from if there is one.

        Raises:
            OSError: where no process can be started (memory, process or descriptor limit).
        """
        channel, theirs = Channel.pair()
        descriptors = [theirs.fileno(), page.descriptor]
        arguments = [*descriptors, slot_number]
        if listener is not None:
            descriptors.append(listener.fileno())
            arguments.append(listener.fileno())
        try:
            channel.send(config)
            # -c rather than -m: runpy would import the package twice over. A fresh interpreter, never a fork:
            # C-core and its threads do not survive a fork. -P: no module comes from the working directory.
            program = "import sys; from definition_server.data_plane.worker import main; sys.exit(main(sys.argv[1:]))"
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-c",
                program,
                *(str(argument) for argument in arguments),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=descriptors,
                env=_environment(),
            )
        except BaseException:
            channel.close()
            raise
        finally:
            theirs.close()
        return cls(number, process, channel, page.slot(slot_number), on_keys_used)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        if self._process.returncode is None:
            self._process.kill()

    def reconcile(self, keys: Keys, certificate: Certificate, publication: Publication | None) -> None:
        """Send the worker what it has not been sent yet. To be called repeatedly.

        A worker that does not read now (its queue is full) gets the newest state at a later call, and no backlog.
        """
        try:
            if keys != self._sent_keys and self._channel.send(keys):
                self._sent_keys = keys
            if certificate != self._sent_certificate and self._channel.send(certificate):
                self._sent_certificate = certificate
            if publication is not None and self._lacks(publication.snapshot.generation):
                snapshot = publication.snapshot
                message = Publish(snapshot.generation, snapshot.version_hash)
                if self._channel.send(message, publication.descriptor):
                    self._sent_generation = snapshot.generation
                    self._sent_at = asyncio.get_running_loop().time()
        except ChannelClosed:
            return  # the process is ending: see `ended`

    def _lacks(self, generation: int) -> bool:
        """Whether the snapshot must be sent: it never was, or the worker did not take it (no free descriptor)."""
        if generation != self._sent_generation:
            return True
        late = asyncio.get_running_loop().time() - self._sent_at > _SEND_AGAIN_SECONDS
        return self.ready.is_set() and self.generation != generation and late

    def drain(self, drain: Drain) -> None:
        """Make the worker drain and exit."""
        self.draining = True
        try:
            if not self._channel.send(drain):
                self.kill()
        except ChannelClosed:
            return  # it is exiting already

    def _receive(self) -> None:
        try:
            while (received := self._channel.receive()) is not None:
                message = received[0]
                if isinstance(message, Ready):
                    self.generation = message.generation
                    self.jail = extent_of(message.jail)
                    self.ready.set()
                elif isinstance(message, KeysUsed):
                    self._on_keys_used(message.digests)
        except MessageError as error:
            log.error("Worker's message ignored", worker=self.number, error=str(error))
        except ChannelClosed:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())

    async def _reap(self) -> int:
        code = await self._process.wait()
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self._channel.close()
        # The other workers must not leave a connection to a dead one.
        self.slot.stop_accepting()
        return code
