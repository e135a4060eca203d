"""Peers: small servers that we wrote to implement the contract on other gRPC stacks; they are measured together with
ours.

Every peer is one program with these environment variables: ``PEER_CATALOGUE``, a file with a serialized
``CatalogResponse``, which is a sequence of length-prefixed ``CommandResponse`` messages and the catalogue's own two
fields; ``PEER_KEY``, the required value of ``x-avap-auth``; ``PEER_PORT``, the port to listen on at 127.0.0.1;
``PEER_WORKERS``, the number of threads or processes that may answer; and with TLS ``PEER_TLS_CERT`` and
``PEER_TLS_KEY``, PEM files. A peer prints the port when it accepts calls, and ends when its standard input ends, so
that it never outlives the process that started it.

A peer answers ``GetCommand`` and ``SyncCatalog`` from memory, with the statuses of our server: ``UNAUTHENTICATED``
"Invalid Credentials", compared in constant time and before the name is looked up, and ``NOT_FOUND`` "Command '<name>'
not found". Answers are slices of the catalogue, encoded before the measurement: no peer spends time on encoding
protobuf, unlike production code on these stacks. So the stack itself is measured, with its default settings.

pajamax 0.4 (Rust, synchronous) is not a peer. It reads only the header field ``:path`` of a request, so a server on it
cannot check ``x-avap-auth``. It also ignores the client's WINDOW_UPDATE frames, so it sends catalogues regardless of
the client's windows.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from definition_server.catalog.snapshot import Snapshot
from perf.peers.compiled import COMPILED
from perf.peers.stacks import STACKS, Build, Stack, tool_version
from perf.targets import target as targets

BUILDS: dict[str, Build] = {COMPILED.name: COMPILED, **STACKS}
"""Everything that has to be built: the peers, and our own compiled engine."""
_FILES = {
    "nghttpd": ("Debian nghttp2-server", "--version", targets.nghttpd),
    "nginx": ("Debian nginx", "-v", targets.nginx),
}
"""Servers of files: name → the package, the option that prints the version, the function that starts the server."""
NAMES = (*STACKS, *_FILES)
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_LAST_OCTETS = 2000


class PeerMissing(targets.TargetFailed):
    """The peer cannot be started on this machine; the text says how to install it."""


class Served(Protocol):
    """A catalogue that a peer serves, such as a `perf.targets.catalogue.Catalogue`."""

    @property
    def snapshot(self) -> Snapshot:
        """The catalogue as a snapshot object."""


def missing(name: str) -> str:
    """The reason why the peer or build ``name`` cannot be started on this machine; empty if it can be started.

    Raises:
        PeerMissing: for an unknown name.
    """
    if name in _FILES:
        return "" if shutil.which(name) else f"missing on this machine: {name} ({_FILES[name][0]})"
    return (COMPILED if name == COMPILED.name else _stack(name)).missing


def versions(name: str) -> dict[str, str]:
    """Versions of the peer or build ``name`` and of its runtime, for a record.

    Raises:
        PeerMissing: for an unknown name.
    """
    if name in _FILES:
        return tool_version(name, _FILES[name][1])
    return (COMPILED if name == COMPILED.name else _stack(name)).versions()


def compiled_engine() -> Path:
    """The folder from which our packages with the compiled engine are imported.

    Raises:
        PeerMissing: if the engine is not built from the present sources, or cannot be built.
    """
    if reason := COMPILED.missing:
        raise PeerMissing(f"{COMPILED.name} cannot be started: {reason}")
    return COMPILED.place


@contextmanager
def start(
    name: str,
    catalogue: Served,
    *,
    workers: int = 1,
    tls: Mapping[str, str] | None = None,
    cpus: Sequence[int] = (targets.SERVER_CPU,),
) -> Iterator[targets.Target]:
    """The peer ``name``, one of `NAMES`, serving ``catalogue`` until the block ends.

    ``tls``: the result of `perf.targets.target.self_signed`. ``cpus``: the CPUs on which it may run. nghttpd and nginx
    serve the catalogue's first answer as the file ``/answer``, in one thread and without TLS.

    Raises:
        PeerMissing: if the peer is not built, or a tool is missing.
        TargetFailed: if the server does not start, or ends before the block.
    """
    reason = missing(name)
    if reason:
        raise PeerMissing(f"{name} cannot be started: {reason}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="definition-server-peer-")))
        if name in _FILES:
            yield stack.enter_context(_yardstick(name, folder, catalogue, workers, tls))
            return
        (folder / "catalogue").write_bytes(catalogue.snapshot.body)
        port = targets.free_port()
        given = {
            "PEER_CATALOGUE": str(folder / "catalogue"), "PEER_KEY": targets.KEY, "PEER_PORT": str(port),
            "PEER_WORKERS": str(workers),
        }  # fmt: skip
        if tls:
            given |= {"PEER_TLS_CERT": tls["tls_cert_file"], "PEER_TLS_KEY": tls["tls_key_file"]}
        command = ["taskset", "-c", ",".join(map(str, cpus)), *_stack(name).command()]
        errors = folder / "errors"
        with errors.open("wb") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | given,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        stack.callback(_stop, process)
        if _first_line(process).strip() != b"%d" % port:
            raise targets.TargetFailed(f"{name} does not start: {_last_words(errors)}")
        yield targets.Target(name, port, process.pid)
        if process.poll() is not None:
            raise targets.TargetFailed(f"{name} ended with {process.returncode}: {_last_words(errors)}")


def _stack(name: str) -> Stack:
    if name not in STACKS:
        raise PeerMissing(f"there is no peer {name!r}; there are {', '.join(NAMES)}")
    return STACKS[name]


@contextmanager
def _yardstick(
    name: str, folder: Path, catalogue: Served, workers: int, tls: Mapping[str, str] | None
) -> Iterator[targets.Target]:
    if tls or workers != 1:
        raise PeerMissing(f"{name} is measured only in one thread and without TLS")
    message = bytes(next(catalogue.snapshot.messages()))
    (folder / "answer").write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    with _FILES[name][2](folder) as target:
        yield target


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    """The first line that the process prints; incomplete if it ends or takes longer than `_START_SECONDS`."""
    deadline, line = time.monotonic() + _START_SECONDS, b""
    if process.stdout is None:
        return line
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n") and selector.select(max(0.0, deadline - time.monotonic())):
            octets = os.read(process.stdout.fileno(), 64)
            if not octets:
                break
            line += octets
    return line


def _last_words(errors: Path) -> str:
    return errors.read_bytes()[-_LAST_OCTETS:].decode(errors="replace").strip() or "it printed no error"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and all of its child processes."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # The process leads its own session, so all processes that it has started are in its group.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
