"""Strangers at the admin port of a running server use a limited number of connections, and no probe fails."""

from __future__ import annotations

import os
import resource
import selectors
import signal
import socket
import ssl
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.families import sample
from tests.support.leftovers import open_descriptors
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table

from definition_server.control_plane.admin_port import MOST_CONNECTIONS

STRANGERS = 1000
LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp."""
BEGINNING = b"GET /metrics HTTP/1.1\r\nHost: a\r\nX-Slow: "


@pytest.fixture
def server(table: Table, start_server: StartServer) -> ServerProcess:
    table.add_commands(3)
    return start_server(table.url, WORKERS="1").wait_ready()


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


class Strangers:
    """Clients that never complete a request, and connect again when they are disconnected."""

    def __init__(self, port: int, count: int, beginning: bytes) -> None:
        self._port = port
        self._beginning = beginning
        self._selector = selectors.DefaultSelector()
        self.cut_off = 0
        for _ in range(count):
            self._connect()

    def _connect(self) -> None:
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", self._port))
        self._selector.register(client, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def trickle(self) -> None:
        """Send the beginning of a request, or one more octet, on each connection. Replace the connections that were
        closed."""
        for key, events in self._selector.select(0):
            client = key.fileobj
            assert isinstance(client, socket.socket)
            try:
                if events & selectors.EVENT_READ and not client.recv(4096):
                    raise ConnectionResetError
                client.send(b"a" if key.data else self._beginning)
                self._selector.modify(client, selectors.EVENT_READ | selectors.EVENT_WRITE, "begun")
            except BlockingIOError:
                continue
            except OSError:
                self.cut_off += 1
                self._selector.unregister(client)
                client.close()
                self._connect()

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()


@contextmanager
def strangers(port: int, count: int, beginning: bytes) -> Iterator[Strangers]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"no more than {hard} files may be opened here")
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    made = Strangers(port, count, beginning)
    try:
        yield made
    finally:
        made.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connections_of(server: ServerProcess) -> int:
    """The number of the master's descriptors that are connections of its admin port."""
    sockets = {target for target in open_descriptors(server.pid).values() if target.startswith("socket:")}
    tables = (Path(f"/proc/{server.pid}/net/{name}").read_text() for name in ("tcp", "tcp6"))
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return sum(
        int(row[1].partition(":")[2], 16) == server.metrics_port
        and row[3] != LISTENS
        and f"socket:[{row[9]}]" in sockets
        for row in rows
    )


@pytest.mark.thorough  # a thousand connections
@pytest.mark.any_transport
@pytest.mark.parametrize("beginning", sample([BEGINNING, b""]), ids=["trickling", "silent"])
def test_no_probe_fails_and_no_thread_starts_while_a_thousand_strangers_are_connected(
    server: ServerProcess, beginning: bytes
) -> None:
    server.http("/readyz")
    threads = threads_of(server.pid)
    cycles = sum(server.statusz()["sync"]["cycles"].values())
    with strangers(server.metrics_port, STRANGERS, beginning) as crowd:
        waits = []
        for _ in range(21):
            crowd.trickle()
            started = time.monotonic()
            assert server.http("/readyz") == (200, "ready\n")
            waits.append(time.monotonic() - started)
            assert threads_of(server.pid) <= threads
            # The count may be one higher for a moment: a connection is accepted before another one is closed for it.
            assert connections_of(server) <= MOST_CONNECTIONS + 1
        assert statistics.median(waits) < 1.0
        assert server.http("/metrics")[0] == 200
        until(lambda: sum(server.statusz()["sync"]["cycles"].values()) > cycles + 1, "cycles go on")
        assert crowd.cut_off > STRANGERS // 2
        assert connections_of(server) > MOST_CONNECTIONS // 2  # the descriptors are counted
    line = server.wait_log("The admin port is full; its oldest connection was closed")
    assert line["peer"].startswith("127.0.0.1:")
    assert len(server.logged("The admin port is full; its oldest connection was closed")) < 100


@pytest.mark.thorough  # replaces workers
@pytest.mark.any_transport
def test_a_master_with_few_descriptors_syncs_and_replaces_workers_while_strangers_connect(
    table: Table, transport: str
) -> None:
    table.add_commands(3)
    server = ServerProcess(table.url, WORKERS="1", TRANSPORT=transport)
    server.command = ["/bin/sh", "-c", 'ulimit -n 80; exec "$@"', "sh", *server.command]
    with server:
        server.wait_ready()
        with strangers(server.metrics_port, 300, BEGINNING) as crowd:
            crowd.trickle()
            cycles = server.statusz()["sync"]["cycles"]
            (victim,) = server.worker_pids()
            os.kill(victim, signal.SIGKILL)
            until(lambda: crowd.trickle() or server.statusz()["workers"][0]["restarts"] == 1, server.tail)
            until(lambda: crowd.trickle() or server.statusz()["workers"][0]["state"] == "serving", server.tail)
            table.add_commands(1, start=3)
            until(lambda: crowd.trickle() or server.statusz()["catalog"]["definitions"] == 4, server.tail)
            assert server.statusz()["sync"]["cycles"]["failed"] == cycles["failed"]


@pytest.mark.any_transport
def test_slow_readers_are_disconnected_and_do_not_delay_others(server: ServerProcess) -> None:
    with ExitStack() as stack:
        for _ in range(MOST_CONNECTIONS * 2):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.connect(("127.0.0.1", server.metrics_port))
            slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 50)
        started = time.monotonic()
        assert server.http("/readyz")[0] == 200
        assert time.monotonic() - started < 5.0, "a probe had to wait for a slow reader"


@pytest.mark.any_transport
def test_clients_of_other_protocols_are_answered_in_theirs_and_logged_with_their_address(
    server: ServerProcess,
) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", server.metrics_port), 10) as client:
        name = client.getsockname()
        with pytest.raises(ssl.SSLError, match="ALERT"):
            context.wrap_socket(client)
    line = server.wait_log("A client of the admin port broke its protocol")
    assert (line["peer"], "TLS" in line["error"]) == (f"{name[0]}:{name[1]}", True)
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", server.metrics_port), 10) as client:
            client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            with client.makefile("rb") as file:
                assert file.read().endswith(b"\0\0\0\0\0\0\0\x0d")  # GOAWAY, HTTP_1_1_REQUIRED
    lines = server.logged("A client of the admin port broke its protocol")
    assert 2 <= len(lines) < 60
    assert any("HTTP/2" in line["error"] for line in lines)
