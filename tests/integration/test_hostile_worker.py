"""A worker that attacks its master harms only itself: the other workers serve, and it is replaced."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.support.client import Client
from tests.support.families import sample
from tests.support.leftovers import open_descriptors
from tests.support.polling import until
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

from definition_server.cli.embedded_postgres import free_port

pytestmark = [pytest.mark.slow, pytest.mark.transports("native")]

TAKEN_OVER = """
import os, sys
if "definition_server.data_plane.worker" in " ".join(sys.orig_argv) and os.path.exists({armed!r}):
    try:
        os.rename({armed!r}, {used!r})  # one worker alone
    except OSError:
        pass
    else:
        import fcntl, mmap, resource, signal, socket, time
        control, stats = (int(number) for number in sys.orig_argv[-3:-1])
        raw = socket.socket(fileno=os.dup(control))
        page = mmap.mmap(stats, 0)
        def attack():
{attack}
        attack()
"""

ATTACKS = {
    "generation that is text": r"""raw.send(b'{"type": "Ready", "generation": "x"}')""",
    "generation that was never published": r"""
raw.send(b'{"type": "Mapped"}'); raw.send(b'{"type": "Ready", "generation": 99}')
""",
    "READY before anything": r"""raw.send(b'{"type": "Ready", "generation": 0}')""",
    "message of the other direction": r"""raw.send(b'{"type": "Keys", "digests": []}')""",
    "huge message": r"""raw.send(b'{"type": "Ready", "generation": ' + b"1" * 50_000 + b"}")""",
    "no JSON": r"""raw.send(b"\xff" * 100)""",
    "descriptors": r"""
    while True:
        socket.send_fds(raw, [b'{"type": "Mapped"}'], [0] * 250)
""",
    "flood": r"""
    raw.send(b'{"type": "Mapped"}')
    while True:
        raw.send(b'{"type": "Ready", "generation": 0}')
""",
    "resized and forged stats": r"""
    try: os.ftruncate(stats, 0)
    except OSError: pass
    while True:
        page[:] = b"\xff" * len(page)
""",
    "closed control socket": r"""raw.shutdown(socket.SHUT_RDWR); time.sleep(100)""",
    "stats sealed by itself": r"""fcntl.fcntl(stats, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)""",
}


def take_over(tmp_path: Path, armed: Path, attack: str) -> str:
    """A directory for PYTHONPATH: the next worker that finds ``armed`` attacks."""
    lines = "\n".join("            " + line for line in attack.strip("\n").splitlines())
    script = TAKEN_OVER.format(armed=str(armed), used=str(tmp_path / "used"), attack=lines)
    (tmp_path / "sitecustomize.py").write_text(script)
    return f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"


def _descriptors(server: ServerProcess) -> int:
    """The descriptors of the master, without its reserve, which it uses while it works."""
    return sum(file != "/dev/null" for file in open_descriptors(server.pid).values())


@pytest.mark.parametrize("attack", sample(ATTACKS, ("resized and forged stats",)))
def test_a_hostile_worker_harms_only_itself(attack: str, table: Table, database_url: str, tmp_path: Path) -> None:
    table.add_commands(1)
    armed = tmp_path / "armed"
    path = take_over(tmp_path, armed, ATTACKS[attack])
    with ServerProcess(database_url, PYTHONPATH=path, START_TIMEOUT_SECONDS="20") as server:
        server.wait_ready()
        first, second = server.worker_pids()
        with Client(server.port, KEY) as client:
            for _ in range(5):
                client.get("command0")
        server.wait_metric(5, "avap_requests_total", status="200")
        descriptors = _descriptors(server)
        armed.touch()
        os.kill(first, 9)
        until(lambda: (tmp_path / "used").exists(), "the next worker attacks")
        killed = until(
            lambda: (
                server.logged("Worker violates the control protocol; killed")
                + server.logged("Worker misbehaves; killed")
            ),
            lambda: f"the attacker is killed:\n{server.tail()}",
            seconds=40,
        )
        attacker = killed[0]["worker_pid"]
        until(
            lambda: len(server.worker_pids()) == 2 and attacker not in server.worker_pids()
            and server.metric("avap_worker_up", worker="0") + server.metric("avap_worker_up", worker="1") == 2,
            lambda: f"another worker serves in its place:\n{server.tail()}",
            seconds=40,
        )  # fmt: skip
        assert len([line for line in killed if line["worker_pid"] == attacker]) == 1, "logged once"
        assert second in server.worker_pids(), "the other worker is left alone"
        assert server.http("/readyz")[0] == 200
        assert 5 <= server.metric("avap_requests_total", status="200") < 10_000, "nothing forged is counted"
        with Client(server.port, KEY) as client:
            assert client.get("command0").name == "command0"
        assert _descriptors(server) <= descriptors + 4
        assert not server.other_output, "no traceback"


@pytest.mark.thorough  # takes seconds
def test_workers_lose_no_connection_if_one_of_them_makes_the_shared_socket_blocking(
    table: Table, database_url: str, tmp_path: Path
) -> None:
    """All processes that share the listening socket share O_NONBLOCK; no filter can read what FIONBIO points to."""
    table.add_commands(1)
    armed = tmp_path / "armed"
    attack = """
    while True:
        fcntl.fcntl(int(sys.orig_argv[-1]), fcntl.F_SETFL, 0)
        time.sleep(0.0001)
"""
    path = take_over(tmp_path, armed, attack)
    settings = {"START_TIMEOUT_SECONDS": "60", "HEARTBEAT_TIMEOUT_SECONDS": "2"}
    with ServerProcess(database_url, PYTHONPATH=path, **settings) as server:
        server.wait_ready()
        first, second = server.worker_pids()
        armed.touch()
        os.kill(first, 9)
        until(lambda: (tmp_path / "used").exists(), "the next worker attacks")
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            with Client(server.port, KEY) as client:
                assert client.get("command0", timeout=5).name == "command0"
        assert second in server.worker_pids()
        assert not server.logged("Worker hangs; killed")


@pytest.mark.parametrize("port", sample(["chosen", "0"]))
def test_a_port_that_a_worker_shuts_down_is_opened_again_and_the_workers_are_replaced(
    port: str, table: Table, database_url: str, tmp_path: Path
) -> None:
    """The jail permits only SHUT_WR, which has no effect on a listening socket, so this test turns the jail off."""
    table.add_commands(1)
    armed = tmp_path / "armed"
    attack = "    socket.socket(fileno=os.dup(int(sys.orig_argv[-1]))).shutdown(socket.SHUT_RDWR)"
    path = take_over(tmp_path, armed, attack)
    chosen = "0" if port == "0" else str(free_port())
    with ServerProcess(database_url, PYTHONPATH=path, JAIL="off", PORT=chosen) as server:
        server.wait_ready()
        before = server.worker_pids()
        armed.touch()
        os.kill(before[0], 9)
        message = "The port was shut down by a worker; it is open again, and the workers are replaced"
        server.wait_log(message)
        until(lambda: len(server.logged("Worker rolled")) == 2, server.tail, seconds=40)
        assert before[1] not in server.worker_pids()
        for _ in range(5):
            with Client(server.port, KEY) as client:
                assert client.get("command0").name == "command0"
        assert len(server.logged(message)) == 1
        assert not server.other_output, "no traceback"
