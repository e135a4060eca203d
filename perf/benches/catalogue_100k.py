"""The cost of 100,000 definitions of 2 kB: start, unchanged cycle, one changed row, memory, publication under load.

    python -m perf catalogue [--rows N] [--workers N] [--rate N]

Needs a PostgreSQL provider of the tests. Another process offers the load on a schedule; latency counts from the
scheduled instant. The record goes to ``perf/results/``. The limits are the project's promises.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.client import Client
from tests.support.polling import until
from tests.support.providers import any_provider_or_skip, create_database
from tests.support.proxy import Proxy
from tests.support.server import ServerProcess
from tests.support.table import Table

from perf.benches.figures import Figures

CODE_OCTETS = 2000
PUBLISHES = 3
STARTS = 5


@contextmanager
def load_process(port: int, rate: int, rows: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """Load from another process; the yielded function ends that process and returns its figures."""
    process = subprocess.Popen(
        [sys.executable, "-m", "perf.benches.steady_load", str(port), str(rate), str(rows)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"

    def finish() -> dict[str, Any]:
        output, _ = process.communicate("stop\n", timeout=60)
        result: dict[str, Any] = json.loads(output)
        return result

    try:
        yield finish
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def pss_beyond_snapshot(pid: int) -> float:
    """Proportional set size in MB of a process, without its mapping of the snapshot."""
    total = _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss:")
    shared, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = "avap-snapshot" in line
        elif inside and line.startswith("Pss:"):
            shared += int(line.split()[1])
    return (total - shared) / 1024


def _kilobytes(text: str, label: str) -> int:
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(label))


def start_to_serving(server: ServerProcess) -> float:
    """Seconds from process start until a client's health check reports SERVING on every worker."""
    started = time.monotonic()
    server.start()
    server.wait_log("Serving", seconds=120)
    with Client(server.port) as client:
        until(lambda: client.health() == "SERVING", "SERVING")
    return time.monotonic() - started


def measure(url: str, arguments: argparse.Namespace, figures: Figures) -> None:
    """All figures, on one server."""
    table = Table(url)
    table.add_commands(arguments.rows, CODE_OCTETS)
    table.run("VACUUM ANALYZE obex_dapl_functions")
    settings = {"WORKERS": str(arguments.workers), "STATEMENT_TIMEOUT_SECONDS": "30", "SYNC_INTERVAL_SECONDS": "1"}
    starts = []
    for _ in range(STARTS):
        server = ServerProcess(url, **settings)
        starts.append(start_to_serving(server))
        server.end()
    # Other work on the machine can only delay a start, so the shortest of several is the server's own time.
    figures.note(f"process start to SERVING, best of {STARTS}", min(starts), "s", 3)
    figures.note(f"process start to SERVING, median of {STARTS}", statistics.median(starts), "s")
    with Proxy(url) as proxy, ServerProcess(proxy.url, **settings) as server:
        server.wait_ready(120)
        unchanged_cycle(server, proxy, figures)
        figures.note("sync cycle, unchanged", server.statusz()["sync"]["last_duration_seconds"] * 1000, "ms")
        changed_row(server, table, figures)
    with ServerProcess(url, **settings) as server:
        server.wait_ready(120)
        publish_under_load(server, table, arguments, figures)
        for number, pid in enumerate(server.worker_pids()):
            figures.note(f"worker {number}: PSS beyond the snapshot", pss_beyond_snapshot(pid), "MB", 60)


def unchanged_cycle(server: ServerProcess, proxy: Proxy, figures: Figures) -> None:
    """Bytes that the database sends in a cycle, the mean of five cycles."""

    def cycles() -> int:
        return int(server.statusz()["sync"]["cycles"]["unchanged"])

    first = until(cycles, "the first unchanged cycle")
    moved = proxy.bytes_from_database
    until(lambda: cycles() >= first + 5, "five more cycles")
    figures.note("bytes from the database in an unchanged cycle", (proxy.bytes_from_database - moved) / 5, "B", 100_000)
    figures.note("publications so far", server.statusz()["sync"]["cycles"]["published"], "", 1)


def changed_row(server: ServerProcess, table: Table, figures: Figures) -> None:
    """Seconds from COMMIT until the last worker serves the changed row, including the wait for the cycle."""
    table.run("UPDATE obex_dapl_functions SET code = 'changed' WHERE name = 'command7'")
    committed = time.monotonic()
    until(lambda: {worker["generation"] for worker in server.statusz()["workers"]} == {2}, server.tail)
    figures.note("one changed row: COMMIT to served by every worker", time.monotonic() - committed, "s")
    figures.note(
        "of which the cycle", server.wait_log("Definitions Broadcasted", generation=2)["duration_ms"] / 1000, "s"
    )


def publish_under_load(server: ServerProcess, table: Table, arguments: argparse.Namespace, figures: Figures) -> None:
    """The slowest request without publications, and the slowest request while whole catalogues are published."""
    for name, publishes in (("quiet", 0), ("publishing", PUBLISHES)):
        with load_process(server.port, arguments.rate, arguments.rows) as finish:
            time.sleep(5)  # the result covers the measured period only
            for _ in range(publishes):
                generation = server.statusz()["catalog"]["generation"]
                # One changed row makes the server read, build and publish all rows; further changes only cost CPU time.
                table.run("UPDATE obex_dapl_functions SET code = code || '#' WHERE name = 'command7'")
                until(partial(_served_after, server, generation), server.tail, seconds=120)
            seen = finish()
        limit = 50 if publishes else None
        figures.note(f"{name}: requests answered at {arguments.rate}/s", seen["answered"], "")
        figures.note(f"{name}: requests failed", seen["failed"], "", 0)
        for percentile in ("p50", "p95", "p99", "p999"):
            figures.note(f"{name}: {percentile}", seen[percentile], "ms")
        figures.note(f"{name}: slowest request", seen["max"], "ms", limit)


def _served_after(server: ServerProcess, generation: int) -> bool:
    return bool(server.statusz()["catalog"]["generation"] > generation)


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print the figures and store the record."""
    parser = argparse.ArgumentParser(
        prog="python -m perf catalogue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rate", type=int, default=1000)
    arguments = parser.parse_args(given)
    figures = Figures("100,000 definitions", vars(arguments) | {"code_octets": CODE_OCTETS})
    database = any_provider_or_skip()
    try:
        measure(create_database(database.url, "catalogue_100k"), arguments, figures)
    finally:
        database.close()
    return figures.close("catalogue-100k")
