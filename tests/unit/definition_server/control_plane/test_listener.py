"""The port belongs to one master and its workers. A second master is refused, and a restart does not have to wait."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from tests.support.polling import until

from definition_server.control_plane import listener
from definition_server.control_plane.listener import PortInUse, listen, reason_text, reserve_port
from grpc_h2 import BACKLOG

pytestmark = pytest.mark.usefixtures("nothing_is_left")

NOBODY = 65534


class Clock:
    """Replaces the module `time`: sleeping takes no time, and may have a side effect."""

    def __init__(self) -> None:
        self.now = 0.0
        self.naps = 0
        self.during_nap = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.naps += 1
        self.during_nap()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(listener, "time", clock)
    return clock


def worker_socket(port: int, host: str = "127.0.0.1") -> socket.socket:
    """A socket as gRPC's C-core opens it in a worker."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((host, port))
        made.listen()
    except OSError:
        made.close()
        raise
    return made


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


ADDRESSES = [
    "127.0.0.1",
    "0.0.0.0",
    pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
    pytest.param("::", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
]


# -- one master ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ADDRESSES)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_second_master_is_refused_before_and_after_workers_listen(clock: Clock, host: str, workers: int) -> None:
    with reserve_port(host, 0) as holder, ExitStack() as stack:
        port = holder.getsockname()[1]
        for _ in range(workers):
            stack.enter_context(worker_socket(port, host))
        with pytest.raises(PortInUse) as caught:
            reserve_port(host, port)
    assert str(caught.value) == (
        f"{shown(host)}:{port} is in use by another process (another definition-server?). "
        "Stop it, or set PORT to a free port."
    )


def test_a_second_master_on_every_address_is_refused_too(clock: Clock) -> None:
    with reserve_port("127.0.0.1", 0) as holder, pytest.raises(PortInUse):
        reserve_port("0.0.0.0", holder.getsockname()[1])


def test_a_port_that_another_server_uses_is_refused(clock: Clock) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other, pytest.raises(PortInUse, match="in use"):
        reserve_port("127.0.0.1", other.getsockname()[1])


def test_a_port_of_a_server_with_so_reuseport_is_refused(clock: Clock) -> None:
    with worker_socket(0) as other, pytest.raises(PortInUse, match="in use"):
        reserve_port("127.0.0.1", other.getsockname()[1])


def test_a_server_without_so_reuseport_cannot_bind_the_reserved_port() -> None:
    with reserve_port("127.0.0.1", 0) as holder, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", holder.getsockname()[1]))


@pytest.mark.parametrize("host", ADDRESSES)
def test_all_workers_can_listen_and_are_reached(host: str) -> None:
    with reserve_port(host, 0) as holder:
        port = holder.getsockname()[1]
        with worker_socket(port, host) as first, worker_socket(port, host) as second:
            workers = (first, second)
            for worker in workers:
                worker.setblocking(False)
            reached: set[int] = set()
            deadline = time.monotonic() + 30
            while len(reached) < 2 and time.monotonic() < deadline:
                target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
                with socket.create_connection((target, port)):
                    reached.add(until(lambda: accepted(workers), "the connection accepted"))
            assert reached == {first.fileno(), second.fileno()}


def accepted(workers: tuple[socket.socket, ...]) -> int | None:
    """Accept and close a waiting connection. Returns the descriptor of the worker at which it waited."""
    for worker in workers:
        try:
            worker.accept()[0].close()
        except BlockingIOError:
            continue
        return worker.fileno()
    return None


def test_the_reserving_socket_accepts_no_connection() -> None:
    with reserve_port("127.0.0.1", 0) as holder, pytest.raises(ConnectionRefusedError):
        socket.create_connection(holder.getsockname())


# -- a restart -------------------------------------------------------------------------------------------------------


def in_time_wait(port: int) -> bool:
    """Whether the kernel still holds a connection of ``port`` in TIME_WAIT (``/proc/net/tcp``, state 06)."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "06" for row in rows)


def test_connections_of_an_earlier_server_in_time_wait_do_not_block(clock: Clock) -> None:
    with reserve_port("127.0.0.1", 0) as holder:
        port = holder.getsockname()[1]
        with worker_socket(port) as worker, socket.create_connection(("127.0.0.1", port)) as client:
            worker.accept()[0].close()  # the side that closes first gets the TIME_WAIT
            assert client.recv(1) == b""
    until(lambda: in_time_wait(port), "the connection in TIME_WAIT")
    reserve_port("127.0.0.1", port).close()
    assert clock.naps == 0


def test_the_bind_is_retried_while_workers_of_a_killed_master_end(clock: Clock) -> None:
    with worker_socket(0) as orphan:
        port = orphan.getsockname()[1]
        clock.during_nap = lambda: orphan.close() if clock.naps == 10 else None
        reserve_port("127.0.0.1", port).close()
    assert clock.naps == 10


def test_the_bind_is_not_retried_for_ever(clock: Clock) -> None:
    with worker_socket(0) as other, pytest.raises(PortInUse):
        reserve_port("127.0.0.1", other.getsockname()[1])
    assert 2.0 <= clock.now < 3.0


# -- addresses that are not available --------------------------------------------------------------------------------


def test_a_foreign_address_is_refused_at_once(clock: Clock) -> None:
    with pytest.raises(PortInUse) as caught:
        reserve_port("192.0.2.1", 50051)
    assert str(caught.value) == (
        "192.0.2.1:50051 cannot be opened (Cannot assign requested address): this machine has no such address. "
        "Set HOST to one that `ip address` lists, or to :: for all addresses."
    )
    assert clock.naps == 0


def test_a_host_name_that_does_not_resolve_is_reported(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unresolved(socket.socket):
        def bind(self, _: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "socket", Unresolved)
    with pytest.raises(PortInUse, match=r"no\.such\.host:50051 cannot be opened \(Name or service not known\)"):
        reserve_port("no.such.host", 50051)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("open_port", [listen, reserve_port])
def test_listening_on_every_address_includes_ipv4_with_any_system_default(
    open_port: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class V6Only(socket.socket):
        """As with ``net.ipv6.bindv6only=1``."""

        def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:  # noqa: A002 - as in `socket`
            super().__init__(family, type, proto, fileno)
            if family == socket.AF_INET6:
                self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)

    monkeypatch.setattr(socket, "socket", V6Only)
    with open_port("::", 0) as made:
        assert made.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
        if open_port is listen:
            for host in ("127.0.0.1", "::1"):
                socket.create_connection((host, made.getsockname()[1]), 10).close()


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_listening_on_every_address_of_a_machine_without_ipv6_uses_ipv4(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoIpv6(socket.socket):
        def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:  # noqa: A002 - as in `socket`
            if family == socket.AF_INET6:
                raise OSError(code, "no IPv6")
            super().__init__(family, type, proto, fileno)

    monkeypatch.setattr(socket, "socket", NoIpv6)
    with listen("::", 0) as made:
        assert made.family == socket.AF_INET
    with pytest.raises(PortInUse, match=r"\[::1\]:\d+ cannot be opened .* Set HOST to"):
        listen("::1", 50051)


def test_a_privileged_port_is_reported_with_a_remedy() -> None:
    assert reason_text("0.0.0.0", 80, "PORT", PermissionError(errno.EACCES, "Permission denied")) == (
        "0.0.0.0:80 may not be opened by this user. Set PORT to a port from 1024 up."
    )


def first_free_to_all() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


@pytest.mark.skipif(first_free_to_all() <= 1, reason="every port is open to every user here")
def test_a_user_without_privilege_is_refused_a_privileged_port() -> None:
    # The package is imported before the privilege is dropped, because the user ``nobody`` may be unable to read the
    # package.
    program = (
        "import os; from definition_server.control_plane.listener import PortInUse, reserve_port\n"
        f"if os.geteuid() == 0: os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "try: reserve_port('127.0.0.1', 1)\n"
        "except PortInUse as error: print(error)"
    )
    assert run(program) == "127.0.0.1:1 may not be opened by this user. Set PORT to a port from 1024 up.\n"


@pytest.mark.parametrize(
    ("host", "variable", "number", "begin", "end"),
    [
        ("h", "PORT", errno.EADDRINUSE, "h:80 is in use", "Stop it, or set PORT to a free port."),
        ("::1", "METRICS_PORT", errno.EACCES, "[::1]:80 may not", "Set METRICS_PORT to a port from 1024 up."),
        ("h", "PORT", errno.EADDRNOTAVAIL, "h:80 cannot be opened", "or to :: for all addresses."),
        ("h", "METRICS_PORT", errno.EAFNOSUPPORT, "h:80 cannot", "Set METRICS_HOST to an IPv4 address, or to :: for "
         "all addresses."),
        ("h", "PORT", errno.EINVAL, "h:80 cannot", "Set HOST to an IP address of this machine, or to :: for all "
         "addresses."),
        ("h", "PORT", errno.ENOBUFS, "h:80 cannot", "(No buffer space available). Check HOST and PORT."),
        ("::", "METRICS_PORT", errno.ENOBUFS, "[::]:80 cannot", "Check METRICS_HOST and METRICS_PORT."),
    ],
    ids=["in use", "privileged", "foreign", "no IPv6", "no address", "another reason", "another reason for metrics"],
)  # fmt: skip
def test_the_remedy_depends_on_the_reason(host: str, variable: str, number: int, begin: str, end: str) -> None:
    text = reason_text(host, 80, variable, OSError(number, os.strerror(number)))
    assert text.startswith(begin)
    assert text.endswith(end)


def test_the_variable_to_set_is_named() -> None:
    taken = OSError(errno.EADDRINUSE, "Address already in use")
    assert "set METRICS_PORT to a free port" in reason_text("127.0.0.1", 9464, "METRICS_PORT", taken)


# -- the descriptor limit --------------------------------------------------------------------------------------------


def run(program: str) -> str:
    """The output of ``program``. It runs in another process, because limits and users cannot be restored in this
    one."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def raised(soft: int, hard: int, wanted: int) -> tuple[int, tuple[int, int], list[dict[str, object]]]:
    """The result of `raise_descriptor_limit`, the limits after it, and its log lines."""
    program = (
        "import resource, json\n"
        "from definition_server.control_plane.listener import raise_descriptor_limit\n"
        "from definition_server.observability.logs import configure_logs\n"
        "configure_logs('production', 'INFO')\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        f"limit = raise_descriptor_limit({wanted})\n"
        # The output is written at once, because another thread writes log lines.
        "print(json.dumps([limit, resource.getrlimit(resource.RLIMIT_NOFILE)]) + '\\n', end='')"
    )
    printed = [json.loads(line) for line in run(program).splitlines()]
    ((limit, limits),) = (each for each in printed if isinstance(each, list))  # log lines may follow the output
    return limit, tuple(limits), [each for each in printed if isinstance(each, dict)]


def test_a_low_soft_limit_is_raised_to_the_wanted_one() -> None:
    assert raised(soft=256, hard=4096, wanted=2048) == (2048, (2048, 4096), [])


def test_a_limit_that_is_high_enough_is_left_alone() -> None:
    assert raised(soft=2048, hard=4096, wanted=1024) == (2048, (2048, 4096), [])


def test_a_low_hard_limit_becomes_the_soft_limit_and_is_logged() -> None:
    # No user, not even root, may go above fs.nr_open.
    wanted = int(Path("/proc/sys/fs/nr_open").read_text()) + 1
    limit, limits, lines = raised(soft=256, hard=1024, wanted=wanted)
    assert (limit, limits) == (1024, (1024, 1024))
    (line,) = lines
    assert line["level"] == "WARN"
    assert line["msg"] == "Limit of open files is low; connections beyond it will be refused"
    assert (line["limit"], line["wanted"]) == (1024, wanted)
    assert "ulimit -n" in str(line["remedy"])


def may_raise_hard_limits() -> bool:
    """Whether this process has CAP_SYS_RESOURCE (``capabilities(7)``)."""
    (effective,) = re.findall(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(int(effective, 16) >> 24 & 1)


@pytest.mark.skipif(not may_raise_hard_limits(), reason="this user may not raise a hard limit")
def test_a_privileged_user_raises_the_hard_limit() -> None:
    assert raised(soft=256, hard=512, wanted=1024) == (1024, (1024, 1024), [])


# -- one socket for all workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ADDRESSES)
def test_a_second_master_can_neither_listen_on_nor_reserve_a_listening_port(clock: Clock, host: str) -> None:
    with listen(host, 0) as first:
        for second in (listen, reserve_port):
            with pytest.raises(PortInUse, match="is in use by another process"):
                second(host, first.getsockname()[1])


def test_a_reserved_port_cannot_be_listened_on(clock: Clock) -> None:
    with reserve_port("127.0.0.1", 0) as holder, pytest.raises(PortInUse):
        listen("127.0.0.1", holder.getsockname()[1])


def test_listening_is_retried_while_workers_of_a_killed_master_end(clock: Clock) -> None:
    first = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    clock.during_nap = first.close
    with listen("127.0.0.1", port) as second:
        assert second.getsockname()[1] == port
    assert clock.naps == 1


def test_the_last_attempt_to_listen_on_a_taken_port_is_after_two_seconds(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_RETRY_EVERY", 0.5)  # a binary fraction, so that its multiples are exact
    with listen("127.0.0.1", 0) as first, pytest.raises(PortInUse):
        listen("127.0.0.1", first.getsockname()[1])
    assert clock.now == 2.5, "the fifth attempt is at 2.0 s"


def test_the_next_master_can_listen_despite_connections_in_time_wait(clock: Clock) -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = first.accept()
            accepted.close()  # the server closes first, so its port has the TIME_WAIT
            assert client.recv(1) == b""
    listen("127.0.0.1", port).close()
    assert clock.naps == 0


def test_connections_wait_while_no_worker_accepts(clock: Clock) -> None:
    wanted = min(BACKLOG, int(Path("/proc/sys/net/core/somaxconn").read_text()), 200)
    with listen("127.0.0.1", 0) as listening, ExitStack() as stack:
        for _ in range(wanted):
            stack.enter_context(socket.create_connection(listening.getsockname(), timeout=5))
        for _ in range(wanted):
            stack.enter_context(closing(listening.accept()[0]))
