"""The master's side of one worker process: starts it by ``exec``, controls it over a socket, and reaps it.

The worker is not trusted (`ipc.messages`, `worker_stats`). An invalid message, a message out of order and too many
messages are *violations*: the process is killed, and is replaced like any other process that ends.
"""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence

from definition_server.control_plane.publisher import Publication
from definition_server.control_plane.worker_stats import WorkerStats
from definition_server.environment import inherited_environment
from definition_server.inherited import interpreter, signals_held_back
from definition_server.ipc import messages
from definition_server.ipc.channel import Channel, ChannelClosed
from definition_server.ipc.tls_files import TlsFiles
from definition_server.jail.confinement import Extent, extent_of
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

# The variables that a Python process and gRPC's C-core need. A worker gets no others: no DATABASE_URL, no key.
_ENVIRONMENT_NAMES = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV")
_ENVIRONMENT_PREFIXES = ("LC_", "LD_", "PYTHON", "GRPC_", "COVERAGE_")
_QUIET = {"GRPC_VERBOSITY": "ERROR"}
"""Without this setting, C-core writes a line that is not JSON to stderr for every GOAWAY. A value set by the operator
takes precedence.
"""

_SEND_AGAIN_SECONDS = 10.0
_DEAF_SECONDS = 5.0
"""Seconds for which a process may run after it has closed its control socket. Normally such a process is about to end.
"""

_BURST_MESSAGES, _MESSAGES_PER_SECOND = 1000.0, 50.0
"""Messages per second. A worker sends two at its start and one after each swap; more than this is a flood."""
_MESSAGES_PER_ITERATION = 64
"""Messages of one worker that are read before the event loop continues with other work."""


class _MessageBudget:
    """A leaky bucket of messages."""

    def __init__(self, now: float) -> None:
        self._left = _BURST_MESSAGES
        self._at = now

    def take(self, now: float) -> bool:
        """Count a message. Returns whether the message is within the limit."""
        self._left = min(_BURST_MESSAGES, self._left + (now - self._at) * _MESSAGES_PER_SECOND) - 1
        self._at = now
        return self._left >= 0


def _environment() -> dict[str, str]:
    """The environment of a worker.

    Only the absolute paths of ``PYTHONPATH`` remain, because a relative or empty entry would depend on the working
    directory.
    """
    environment = _QUIET | inherited_environment(_ENVIRONMENT_NAMES, _ENVIRONMENT_PREFIXES)
    path = environment.pop("PYTHONPATH", "")
    if fixed := [entry for entry in path.split(os.pathsep) if entry.startswith("/")]:
        environment["PYTHONPATH"] = os.pathsep.join(fixed)
    return environment


async def _execute(descriptors: Sequence[int]) -> Process:
    """Start a process that runs a worker, with these descriptors.

    Raises:
        OSError: if no process can be started.
    """
    # -c is used instead of -m, because runpy would import the package twice. A new interpreter is started instead of a
    # fork, because C-core and its threads do not survive a fork. With -P no module is imported from the working
    # directory.
    program = "import sys; from definition_server.data_plane.worker import main; sys.exit(main(sys.argv[1:]))"
    with signals_held_back():
        return await asyncio.create_subprocess_exec(
            interpreter(),
            "-P",
            "-c",
            program,
            *map(str, descriptors),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=descriptors,
            env=_environment(),
        )


class WorkerProcess:
    """A running worker.

    ``ready`` is set once the worker serves. ``generation`` is that of the snapshot that the worker reported last.
    ``ended`` is a task that returns the exit code (negative for a signal) when the process has been reaped.
    """

    def __init__(
        self,
        number: int,
        process: Process,
        channel: Channel,
        stats: WorkerStats,
        certificate: messages.Certificate,
        *,
        loads_by_path: bool = False,
        on_mapped: Callable[[], None],
        on_keys_used: Callable[[tuple[str, ...]], None],
        on_calls_sampled: Callable[[int, messages.CallsSampled], None],
        on_ready: Callable[[WorkerProcess], None],
    ) -> None:
        """``loads_by_path``: whether the worker's transport opens the TLS files, which are in memory, by path."""
        self.number = number
        self._on_keys_used = on_keys_used
        self._on_calls_sampled = on_calls_sampled
        self._on_ready = on_ready
        self.stats = stats
        self.started = asyncio.get_running_loop().time()
        self.mapped = False
        """Whether the stats page is sealed, and other workers may read it."""
        self.ready = asyncio.Event()
        self.generation = 0
        self.jail = Extent.NONE
        """The confinement as the worker reports it. A hostile worker may report something false."""
        self.draining = False
        self.ended: asyncio.Task[int] = asyncio.create_task(self._reap())
        self._process = process
        self._channel = channel
        self._on_mapped = on_mapped
        self._budget = _MessageBudget(self.started)
        self._violated = False
        self._deaf_since: float | None = None
        self._sent_generation = 0
        self._sent_at = 0.0
        self._sent_keys: messages.Keys | None = None
        self._sent_freshness: messages.Freshness | None = None
        self._sent_certificate = certificate
        self._loads_by_path = loads_by_path
        self.outdated = False
        """Whether there is a new certificate that this worker cannot load, so that it must be replaced."""
        self._sent_peers: set[int] = set()
        asyncio.get_running_loop().add_reader(channel.fileno(), self._receive)

    @classmethod
    async def start(
        cls,
        number: int,
        stats: WorkerStats,
        config: messages.Configure,
        certificate: messages.Certificate,
        tls: TlsFiles | None = None,
        listener: socket.socket | None = None,
        *,
        on_mapped: Callable[[], None],
        on_keys_used: Callable[[tuple[str, ...]], None] = lambda _: None,
        on_calls_sampled: Callable[[int, messages.CallsSampled], None] = lambda *_: None,
        on_ready: Callable[[WorkerProcess], None] = lambda _: None,
    ) -> WorkerProcess:
        """Start worker ``number`` with the page of ``stats`` and, if it is given, the ``listener`` to accept from.

        ``tls`` are the TLS files of ``certificate``, None without TLS.
        ``on_mapped`` is called when the other workers may read the worker's page. ``on_ready`` is called whenever the
        worker reports the snapshot that it serves.

        Raises:
            OSError: if no process can be started (memory, process or descriptor limit).
        """
        channel, theirs = Channel.pair()
        descriptors = [theirs.fileno(), stats.page.descriptor]
        if listener is not None:
            descriptors.append(listener.fileno())
        try:
            channel.send(config, *([] if tls is None else tls.descriptors))
            process = await _execute(descriptors)
        except BaseException:
            channel.close()
            raise
        finally:
            theirs.close()
        stats.belongs_to(process.pid)
        return cls(
            number,
            process,
            channel,
            stats,
            certificate,
            loads_by_path=config.transport == "native",
            on_mapped=on_mapped,
            on_keys_used=on_keys_used,
            on_calls_sampled=on_calls_sampled,
            on_ready=on_ready,
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def knows_a_catalogue(self) -> bool:
        """Whether a snapshot was sent to the worker. If so, the worker serves it or will serve it soon."""
        return self._sent_generation > 0

    def kill(self) -> None:
        """SIGKILL."""
        if self._process.returncode is None:
            self._process.kill()

    def reconcile(
        self,
        keys: messages.Keys,
        freshness: messages.Freshness,
        certificate: messages.Certificate,
        tls: TlsFiles | None,
        publication: Publication | None,
        peers: Mapping[int, WorkerProcess],
    ) -> None:
        """Send the worker each part of the state that was not sent to it yet. Called repeatedly.

        ``tls``: the TLS files of ``certificate``.
        ``peers``: process id → worker, for the workers whose stats pages this worker may read.

        If the worker does not read (its queue is full), a later call sends the newest state; messages do not
        accumulate.
        """
        try:
            if keys != self._sent_keys and self._channel.send(keys):
                self._sent_keys = keys
            if freshness != self._sent_freshness and self._channel.send(freshness):
                self._sent_freshness = freshness
            if tls and certificate != self._sent_certificate and self.ready.is_set():
                self._send_certificate(certificate, tls)
            if publication is not None and self._lacks(publication.snapshot.generation):
                snapshot = publication.snapshot
                message = messages.Publish(snapshot.generation, snapshot.version_hash)
                if self._channel.send(message, publication.descriptor):
                    self._sent_generation = snapshot.generation
                    self._sent_at = asyncio.get_running_loop().time()
            self._send_peers(peers)
        except ChannelClosed:
            return  # the process is ending: see `ended`

    def _send_certificate(self, certificate: messages.Certificate, tls: TlsFiles) -> None:
        """Send the certificate to a worker that is READY. Before it is READY, its confinement is not known."""
        if self._loads_by_path and self.jail is Extent.SECCOMP:  # a worker that has become READY cannot open files
            self.outdated = True
        elif self._channel.send(certificate, *tls.descriptors):
            self._sent_certificate = certificate

    def _send_peers(self, peers: Mapping[int, WorkerProcess]) -> None:
        for gone in self._sent_peers - peers.keys():
            if self._channel.send(messages.PeerGone(gone)):
                self._sent_peers.discard(gone)
        for number in peers.keys() - self._sent_peers - {self.pid}:
            if self._channel.send(messages.Peer(number), peers[number].stats.page.descriptor):
                self._sent_peers.add(number)

    def _lacks(self, generation: int) -> bool:
        """Whether the snapshot must be sent, because it was never sent or the worker could not take it (no free
        descriptor).
        """
        if generation != self._sent_generation:
            return True
        late = asyncio.get_running_loop().time() - self._sent_at > _SEND_AGAIN_SECONDS
        return self.ready.is_set() and self.generation != generation and late

    def drain(self, drain: messages.Drain) -> None:
        """Make the worker drain and exit."""
        self.draining = True
        try:
            if not self._channel.send(drain):
                self.kill()
        except ChannelClosed:
            return  # the worker is exiting already

    def problem(self, now: float) -> str | None:
        """The reason why the process must be killed for its actions; None if there is none."""
        self.stats.read()
        if self.stats.fault is not None and not self._violated:
            self._violated = True
            return f"its stats page is not plausible: {self.stats.fault}"
        if self._deaf_since is not None and not self.draining and now - self._deaf_since > _DEAF_SECONDS:
            self._deaf_since = None
            return "it has closed its control socket"
        return None

    def _receive(self) -> None:
        try:
            for _ in range(_MESSAGES_PER_ITERATION):
                received = self._channel.receive()
                if received is None:
                    return
                if not self._budget.take(asyncio.get_running_loop().time()):
                    raise messages.MessageError("a flood of messages")
                self._act_on(received[0])
        except messages.MessageError as error:
            self._on_violation(str(error))
        except ChannelClosed:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._deaf_since = asyncio.get_running_loop().time()

    def _act_on(self, message: messages.Message) -> None:
        """Act on a message of the worker.

        Raises:
            MessageError: if it is out of order.
        """
        if isinstance(message, messages.Mapped) and not self.mapped:
            try:
                self.stats.page.seal()
            except OSError as error:
                raise messages.MessageError(f"its stats page cannot be sealed: {error.strerror}") from None
            self.mapped = True
            self._on_mapped()
        elif isinstance(message, messages.Ready) and self.mapped:
            if not self.generation <= message.generation <= self._sent_generation:
                raise messages.MessageError(
                    f"it reports READY with generation {message.generation}, which was not sent to it"
                )
            self.generation = message.generation
            self.jail = extent_of(message.jail)
            self.ready.set()
            self._on_ready(self)
        elif isinstance(message, messages.KeysUsed) and self.mapped:
            self._on_keys_used(message.digests)
        elif isinstance(message, messages.CallsSampled) and self.mapped:
            if not message.plausible:
                raise messages.MessageError("calls were sampled that cannot be")
            self._on_calls_sampled(self.number, message)
        else:
            raise messages.MessageError(f"{type(message).__name__} is out of order")

    def _on_violation(self, error: str) -> None:
        """Kill the process, and read nothing more from it. For each process that violates the protocol, one line is
        logged.
        """
        self.kill()
        self._violated = True
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        log.error("Worker violates the control protocol; killed", worker=self.number, worker_pid=self.pid, error=error)

    async def _reap(self) -> int:
        code = await self._process.wait()
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self._channel.close()
        return code
