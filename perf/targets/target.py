"""Servers to measure, each on its own CPU: one of our workers, without master and database, and servers of files."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from definition_server.catalog.builder import BuiltSnapshot
from definition_server.ipc.channel import Channel, ChannelClosed
from definition_server.ipc.memory import create_sealed
from definition_server.ipc.messages import Configure, Keys, Publish, Ready
from definition_server.ipc.stats import StatsPage
from perf.targets.processes import children, on_cpu, precise_cpu_seconds, user_seconds

ROOT = Path(__file__).parents[2]
SERVER_CPU, CLIENT_CPU = 0, 1
KEY = "perf-0123456789abcdef"
START_SECONDS = 30.0
_STARTS = 3
"""Number of ports to try, because another process may take a free port before the worker listens on it."""
_EXIT_CANNOT_START = 3
"""The constant of `definition_server.data_plane.worker`, which older revisions may not have."""
_PROGRAM = "import sys; from definition_server.data_plane.worker import main; sys.exit(main(sys.argv[1:]))"
_ENGINE_PROGRAM = """
import sys
sys.path[:0] = {path!r}
import grpc_h2
if grpc_h2.ENGINE != {form!r}:
    sys.exit(f"the engine in {{grpc_h2.__path__[0]}} is {{grpc_h2.ENGINE}}, not {form}")
{program}
"""
_FINISHED = re.compile(r"finished in .*?, ([\d.]+) req/s")
_REQUESTS = re.compile(r"(\d+) total, \d+ started, \d+ done, (\d+) succeeded, (\d+) failed, (\d+) errored")
_STATUS = re.compile(r"status codes: (\d+) 2xx")
_DATA = re.compile(r"\((\d+)\) data")
_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/pid;
events {{ worker_connections 20000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/client_body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    default_type application/octet-stream;
    # As nghttpd does: a file is opened once, and a connection lasts as long as its client wants. sendfile would give a
    # twentieth more in batches, and less than half one call at a time.
    open_file_cache max=16 inactive=1h;
    open_file_cache_valid 1h;
    keepalive_requests 1000000000;
    server {{
        listen 127.0.0.1:{port} http2;
        root {folder};
    }}
}}
"""


class TargetFailed(Exception):
    """A server or a generator failed, so there is no figure."""


class CannotListen(TargetFailed):
    """A worker could not start, most likely because its port is in use."""


@dataclass(frozen=True, slots=True)
class Target:
    """A listening server."""

    name: str
    port: int
    pid: int

    @property
    def pids(self) -> list[int]:
        """The server's processes."""
        return children(self.pid)

    @property
    def cpu_seconds(self) -> float:
        """The CPU time that the server has used so far."""
        return precise_cpu_seconds(self.pids)


def engine_program(form: str, folder: Path | None = None) -> tuple[str, ...]:
    """A worker's program that ends at once unless its engine has the ``form`` ``pure`` or ``compiled``, so that no
    figure is taken for that of the other form. The packages are imported from ``folder``.
    """
    path = [] if folder is None else [str(folder)]
    return sys.executable, "-c", _ENGINE_PROGRAM.format(path=path, form=form, program=_PROGRAM)


def free_port() -> int:
    """A port on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Worker:
    """One worker process; this process takes the master's place."""

    def __init__(
        self,
        transport: str,
        descriptor: int,
        built: BuiltSnapshot,
        *,
        program: Sequence[str] = (sys.executable, "-c", _PROGRAM),
        name: str = "",
        tls_cert_file: str = "",
        tls_key_file: str = "",
        **settings: Any,
    ) -> None:
        """``program`` runs the worker's ``main`` with the arguments appended to it; ``name`` is the target's name."""
        self._channel, theirs = Channel.pair()
        self._page = StatsPage()
        port = settings.get("port") or free_port()
        values: dict[str, Any] = {
            "host": "127.0.0.1", "port": port, "transport": transport, "reflection": False,
            "max_connection_age_seconds": 0.0, "threadpool_size": 4, "app_env": "production", "log_level": "INFO",
            "drain_timeout_seconds": 5.0,
        }  # fmt: skip
        files = [tls_cert_file, tls_key_file] if tls_cert_file else []
        if "tls_cert_file" in Configure.__dataclass_fields__:  # an older revision, whose workers read the TLS files
            values |= dict(zip(("tls_cert_file", "tls_key_file"), files, strict=False))
            files = []
        memory = [create_sealed("tls", [Path(file).read_bytes()]) for file in files]
        self._say(Configure(**values | settings), *memory)
        for each in memory:
            os.close(each)
        self._say(Keys((sha256(KEY.encode()).hexdigest(),)))
        command = [*program, str(theirs.fileno()), str(self._page.descriptor)]
        self._process = subprocess.Popen(
            on_cpu(SERVER_CPU, command),
            pass_fds=[theirs.fileno(), self._page.descriptor],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            text=True,
        )
        theirs.close()
        self.target = Target(name or transport, port, self._process.pid)
        self.output: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.publish(descriptor, built)
        except TargetFailed:
            self.close()
            raise

    def _read(self) -> None:
        if self._process.stdout is not None:
            self.output.extend(self._process.stdout)

    def _say(self, message: Any, *descriptors: int) -> None:
        try:
            sent = self._channel.send(message, *descriptors)
        except ChannelClosed:
            raise self._ended() from None
        if not sent:
            raise TargetFailed("the worker does not read its control socket")

    def _ended(self) -> TargetFailed:
        """The error for a worker that has ended by itself."""
        self._process.wait(START_SECONDS)
        self._reader.join()
        reason = f"the worker ended with {self._process.returncode}: {''.join(self.output)[-2000:]}"
        return CannotListen(reason) if self._process.returncode == _EXIT_CANNOT_START else TargetFailed(reason)

    def publish(self, descriptor: int, built: BuiltSnapshot, *, wait: bool = True) -> None:
        """Publish; with ``wait``, return when the worker serves it.

        Raises:
            TargetFailed: if the worker does not report the new catalogue in time.
        """
        self._say(Publish(built.footer.generation, built.footer.version_hash.hex()), descriptor)
        if wait:
            self.wait_ready(built.footer.generation)

    def wait_ready(self, generation: int) -> None:
        """Wait until the worker serves ``generation``.

        Raises:
            TargetFailed: if the worker does not report that within `START_SECONDS`.
        """
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                received = self._channel.receive()
            except ChannelClosed:
                break
            if received is not None and isinstance(received[0], Ready) and received[0].generation == generation:
                return
            time.sleep(0.005)
        if time.monotonic() < deadline:
            raise self._ended()
        raise TargetFailed(f"the worker does not serve generation {generation}: {''.join(self.output)[-2000:]}")

    @property
    def answered(self) -> int:
        """Calls with any status that the worker itself has counted so far."""
        return sum(self._page.read().requests.values())

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the worker by closing its control socket: a worker without a master drains and exits."""
        self._channel.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._page.close()


@contextmanager
def worker(transport: str, descriptor: int, built: BuiltSnapshot, **settings: Any) -> Iterator[Worker]:
    """A worker that serves ``built``; ``settings`` as for `Worker`.

    Raises:
        TargetFailed: if the worker does not start; `CannotListen` if several ports in succession were in use.
    """
    for attempt in range(_STARTS):
        try:
            made = Worker(transport, descriptor, built, **settings)
            break
        except CannotListen:
            if attempt == _STARTS - 1 or "port" in settings:
                raise
    try:
        yield made
    finally:
        made.close()


@contextmanager
def nghttpd(folder: Path) -> Iterator[Target]:
    """nghttp2's server with one thread, serving the files of ``folder``."""
    port = free_port()
    with _serving_files(["nghttpd", "--no-tls", "-a", "127.0.0.1", "-d", str(folder), str(port)], port) as target:
        yield target


@contextmanager
def nginx(folder: Path) -> Iterator[Target]:
    """nginx with one worker, serving the files of ``folder``, in which it also stores its own files."""
    port = free_port()
    config = folder / "nginx.conf"
    # If root starts it, nginx would give up its rights; but only root may use the folder.
    user = "user root;\n" if os.geteuid() == 0 else ""
    config.write_text(user + _NGINX.format(folder=folder, port=port))
    with _serving_files(["nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)], port) as target:
        yield target


@contextmanager
def _serving_files(command: list[str], port: int) -> Iterator[Target]:
    name = command[0]
    program = shutil.which(name)
    if program is None:
        raise TargetFailed(f"{name} is not installed")
    process = subprocess.Popen(
        on_cpu(SERVER_CPU, [program, *command[1:]]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise TargetFailed(f"{name} does not listen")
            time.sleep(0.01)
        yield Target(name, port, process.pid)
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def h2load(target: Target, path: str, count: int, connections: int, streams: int, *, octets: int,
           request: Path | None = None, tls: bool = False) -> dict[str, Any]:  # fmt: skip
    """``count`` requests by h2load, an independent generator.

    Raises:
        TargetFailed: unless every answer is 2xx with a body of ``octets`` octets.
    """
    program = shutil.which("h2load")
    if program is None:
        raise TargetFailed("h2load is not installed")
    url = f"http{'s' if tls else ''}://127.0.0.1:{target.port}{path}"
    command = [program, f"-c{connections}", f"-m{streams}", f"-n{count}", "-t1", url]
    if request is not None:
        fields = ("content-type: application/grpc", "te: trailers", f"x-avap-auth: {KEY}")
        command += [f"-d{request}", *(f"-H{field}" for field in fields)]
    before, user_before, began = target.cpu_seconds, user_seconds(target.pids), time.monotonic()
    run = subprocess.run(on_cpu(CLIENT_CPU, command), capture_output=True, text=True, timeout=120, check=False)
    seconds, server = time.monotonic() - began, target.cpu_seconds - before
    user = min(server, user_seconds(target.pids) - user_before)
    finished, requests = _FINISHED.search(run.stdout), _REQUESTS.search(run.stdout)
    status, data = _STATUS.search(run.stdout), _DATA.search(run.stdout)
    if not (finished and requests and status and data):
        raise TargetFailed(f"h2load: {(run.stdout + run.stderr)[-500:]}")
    if int(status[1]) != count or int(requests[2]) != count or int(data[1]) != count * octets:
        counts = f"of {count} answers {requests[2]} arrived, {status[1]} with 2xx, {data[1]} octets"
        raise TargetFailed(f"h2load: {counts}; {requests[0]}")
    return {
        "answered": count, "seconds": round(seconds, 3), "server_cpu_seconds": round(server, 4),
        "server_user_seconds": round(user, 4),
        "rate": float(finished[1]), "per_server_cpu_second": count / server if server else 0.0,
    }  # fmt: skip


def self_signed(folder: Path) -> dict[str, str]:
    """A certificate for 127.0.0.1 in ``folder``, as settings of a worker.

    Raises:
        OSError: if the command ``openssl`` is missing.
        CalledProcessError: if the command fails.
    """
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return {"tls_cert_file": str(cert), "tls_key_file": str(key)}


def raise_descriptor_limit() -> int:
    """Raise the limit of descriptors of this process and its children to the maximum. Returns the new limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def keep_to_client_cpu() -> None:
    """Keep this process off the server's CPU."""
    os.sched_setaffinity(0, {CLIENT_CPU})
