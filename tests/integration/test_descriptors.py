"""A master with few descriptors left replaces a worker, syncs and stores: some are reserved for its own work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.test_admin_port import BEGINNING, strangers
from tests.support.client import Client
from tests.support.leftovers import open_descriptors
from tests.support.polling import until
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

from definition_server.control_plane.descriptors import RESERVED, descriptors_needed

pytestmark = [pytest.mark.slow, pytest.mark.any_transport]

LEAK = """
import os, sys, threading, time

def leak():
    while not os.path.exists({armed!r}):
        time.sleep(0.02)
    leaked = []
    try:
        while True:
            leaked.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        os.mkdir({done!r})

if sys.orig_argv[-1] == "serve":
    threading.Thread(target=leak, daemon=True).start()
"""


def with_limit(url: str, limit: int, **settings: str) -> ServerProcess:
    """A server with one worker that may open ``limit`` files."""
    server = ServerProcess(url, WORKERS="1", **settings)
    server.command = ["/bin/sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *server.command]
    return server


def serves_names(server: ServerProcess, count: int) -> bool:
    try:
        with Client(server.port, KEY) as client:
            return client.get(f"command{count - 1}", timeout=1).name == f"command{count - 1}"
    except Exception:  # noqa: BLE001 - not yet
        return False


def a_worker_is_replaced_and_a_change_is_served_and_stored(
    server: ServerProcess, table: Table, stored: Path, meanwhile: Callable[[], None]
) -> None:
    (victim,) = server.worker_pids()
    os.kill(victim, signal.SIGKILL)

    def replaced() -> bool:
        meanwhile()
        return victim not in server.worker_pids() and serves_names(server, 3)

    until(replaced, lambda: f"another worker serves:\n{server.tail()}", seconds=40)
    before = {path: path.stat().st_mtime_ns for path in stored.iterdir()}
    table.add_commands(1, start=3)

    def changed() -> bool:
        meanwhile()
        return serves_names(server, 4)

    until(changed, lambda: f"the change is served:\n{server.tail()}", seconds=30)
    until(
        lambda: {path: path.stat().st_mtime_ns for path in stored.iterdir()} != before,
        lambda: f"the change is stored:\n{server.tail()}",
    )
    for message in ("Worker cannot be started", "Sync failed", "Last-known-good snapshot not stored"):
        assert not server.logged(message), server.tail()


def test_a_master_with_the_lowest_descriptor_limit_works_while_strangers_fill_its_admin_port(
    table: Table, transport: str, tmp_path: Path
) -> None:
    table.add_commands(3)
    limit = descriptors_needed(1)
    with with_limit(table.url, limit, TRANSPORT=transport, SNAPSHOT_DIR=str(tmp_path)) as server:
        server.wait_ready()
        with strangers(server.metrics_port, 100, BEGINNING) as crowd:
            crowd.trickle()
            until(lambda: crowd.trickle() or crowd.cut_off, "the admin port is full")
            a_worker_is_replaced_and_a_change_is_served_and_stored(server, table, tmp_path, crowd.trickle)
        assert not server.logged("Open files run out: the reserve for workers and cycles is not complete")


@pytest.mark.thorough  # takes seconds
def test_a_master_without_a_free_descriptor_works_with_its_reserve(
    table: Table, transport: str, tmp_path: Path
) -> None:
    """Code in the master's process has taken all free descriptors."""
    table.add_commands(3)
    armed, done, stored = tmp_path / "armed", tmp_path / "done", tmp_path / "stored"
    stored.mkdir()
    (tmp_path / "sitecustomize.py").write_text(LEAK.format(armed=str(armed), done=str(done)))
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    settings = {"TRANSPORT": transport, "SNAPSHOT_DIR": str(stored), "PYTHONPATH": path, "SYNC_INTERVAL_SECONDS": "2"}
    with with_limit(table.url, 100, **settings) as server:
        server.wait_ready()
        until(lambda: list(open_descriptors(server.pid).values()).count("/dev/null") >= RESERVED, "the reserve is held")
        armed.touch()
        until(done.exists, "no descriptor is free")
        a_worker_is_replaced_and_a_change_is_served_and_stored(server, table, stored, lambda: None)
