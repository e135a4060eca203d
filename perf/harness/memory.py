"""The memory of whole servers: ``python -m perf memory [--definitions N …] [--workers N …]``.

Measures a whole server (master and workers) on a real PostgreSQL, at rest and while a changed row makes it publish the
whole catalogue again. It counts the memory that a pod is charged for: private pages and file pages of every process,
and each snapshot once, however many processes map it. Needs a PostgreSQL provider of the tests.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support import wire
from tests.support.polling import until
from tests.support.providers import any_provider_or_skip, create_database
from tests.support.server import ServerProcess
from tests.support.table import Table

from perf.targets.processes import cpu_seconds

DEFINITIONS = (1000, 10_000, 100_000)
WORKERS = (1, 2, 4)
CODE_OCTETS = 2000
IDLE = 1000
"""Connections that are opened to measure the memory of one."""
MB = 1 << 20
_SAMPLE_SECONDS = 0.02
_SNAPSHOT = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) +/memfd:avap-snapshot")


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of some processes, in octets."""

    own: dict[int, int]
    """Process → its private pages and its share of the pages of files (``smaps_rollup``: Pss_Anon and Pss_File)."""
    snapshots: int
    """Octets of every snapshot that any of them maps or has open, each counted once."""

    @property
    def total(self) -> int:
        """The memory that a pod with these processes is charged for."""
        return sum(self.own.values()) + self.snapshots

    @classmethod
    def of(cls, pids: Iterable[int]) -> Memory:
        """The memory of ``pids`` now; a process that has ended counts as 0."""
        own, snapshots = {}, {}
        for pid in pids:
            try:
                own[pid] = _own(Path(f"/proc/{pid}/smaps_rollup").read_text())
                snapshots.update(_snapshots(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return cls(own, sum(snapshots.values()))


def _own(rollup: str) -> int:
    lines = (line.split() for line in rollup.splitlines())
    return sum(int(words[1]) for words in lines if words[0] in ("Pss_Anon:", "Pss_File:")) * 1024


def _snapshots(pid: int) -> dict[str, int]:
    """Inode → octets of the snapshots that a process maps or has open (the master writes one before it is mapped)."""
    found: dict[str, int] = {}
    for begin, end, inode in _SNAPSHOT.findall(Path(f"/proc/{pid}/maps").read_text()):
        found[inode] = max(found.get(inode, 0), int(end, 16) - int(begin, 16))
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "memfd:avap-snapshot" in str(descriptor.readlink()):
                status = descriptor.stat()
                found[str(status.st_ino)] = max(found.get(str(status.st_ino), 0), status.st_blocks * 512)
        except FileNotFoundError:
            continue  # the descriptor was closed after the listing
    return found


class Peak(threading.Thread):
    """Samples the memory of processes until `finish`; ``octets`` is the largest sum."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__()
        self._pids, self._stop_asked = pids, threading.Event()
        self.octets = 0

    def run(self) -> None:
        while not self._stop_asked.wait(_SAMPLE_SECONDS):
            self.octets = max(self.octets, Memory.of(self._pids).total)

    def finish(self) -> int:
        """Stop sampling. Returns the peak in octets."""
        self._stop_asked.set()
        self.join()
        return self.octets


def measure(table: Table, workers: int) -> dict[str, Any]:
    """Serve ``table`` with ``workers`` workers. Returns an entry for ``memory`` of a record; sizes in MB (2²⁰ octets).

    Raises:
        AssertionError: if the server does not start or does not publish.
    """
    settings = {"WORKERS": str(workers), "STATEMENT_TIMEOUT_SECONDS": "60", "SYNC_INTERVAL_SECONDS": "1"}
    with ServerProcess(table.url, **settings) as server:
        server.wait_ready(180)
        catalogue, pids = server.statusz()["catalog"], [server.pid, *server.worker_pids()]
        rest, cpu = Memory.of(pids), cpu_seconds(pids[:1])
        watch = Peak(pids)
        watch.start()
        try:
            table.run("UPDATE obex_dapl_functions SET code = code || '#' WHERE name = 'command7'")
            generation = catalogue["generation"]
            until(lambda: server.statusz()["catalog"]["generation"] > generation, server.tail, seconds=180)
            broadcast = server.wait_log("Definitions Broadcasted", generation=generation + 1)
        finally:
            peak = watch.finish()
        cpu = cpu_seconds(pids[:1]) - cpu
        connection = idle_connection(server.port, pids[1:])
    own = [rest.own[pid] for pid in pids[1:]]
    return {
        "definitions": catalogue["definitions"], "workers": workers, "snapshot_octets": catalogue["bytes"],
        "shared_mb": round(rest.snapshots / MB, 2), "private_mb_per_worker": round(sum(own) / workers / MB, 2),
        "master_mb": round(rest.own[pids[0]] / MB, 2), "resident_mb": round(rest.total / MB, 2),
        "peak_mb": round(peak / MB, 2), "publication_seconds": round(broadcast["duration_ms"] / 1000, 3),
        "publication_cpu_seconds": round(cpu, 2), "kb_per_connection": round(connection / 1000, 2),
    }  # fmt: skip


def idle_connection(port: int, pids: list[int]) -> float:
    """Octets that the workers ``pids`` hold for one idle connection, the mean of `IDLE` connections."""
    before = sum(Memory.of(pids).own.values())
    with ExitStack() as held:
        for _ in range(IDLE):
            sock = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            sock.sendall(wire.opening())
            if not sock.recv(4096):  # the server's SETTINGS show that it has accepted the connection
                raise AssertionError("the server closed an idle connection")
        return (sum(Memory.of(pids).own.values()) - before) / IDLE


def grid(definitions: Iterable[int], workers: Iterable[int]) -> list[dict[str, Any]]:
    """`measure` for every pair, with a separate database for each catalogue."""
    measured = []
    database = any_provider_or_skip()
    try:
        for count in definitions:
            table = Table(create_database(database.url, f"memory_{count}"))
            table.add_commands(count, CODE_OCTETS)
            table.run("VACUUM ANALYZE obex_dapl_functions")
            for number in workers:
                measured.append(measure(table, number))
                print(json.dumps(measured[-1]), file=sys.stderr, flush=True)
    finally:
        database.close()
    return measured


def main(given: Sequence[str] | None = None) -> int:
    """Measure, and print the entries as JSON. Returns 1 if there is no PostgreSQL."""
    parser = argparse.ArgumentParser(
        prog="python -m perf memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--definitions", type=int, nargs="+", default=DEFINITIONS)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    arguments = parser.parse_args(given)
    try:
        print(json.dumps(grid(arguments.definitions, arguments.workers), indent=1))
    except pytest.skip.Exception as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 1
    return 0
