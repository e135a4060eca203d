"""How cost grows with the catalogue: the same figures at 1,000, 100,000 and 1,000,000 definitions of 1 kB.

    python -m perf growth [--definitions N …]
    python -m perf growth --page docs/performance.md      # writes the table of the newest record

Needs a PostgreSQL provider of the tests; server, database and client share the machine. The record goes to
``perf/results/<date>-growth.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from tests.support import machine
from tests.support.polling import until
from tests.support.providers import DatabaseServer, any_provider_or_skip, create_database, drop_database
from tests.support.results import keep, newest
from tests.support.server import ServerProcess
from tests.support.table import Table

from perf.benches.catalogue_100k import load_process, pss_beyond_snapshot, start_to_serving
from perf.report.block import replaced
from perf.report.text import number

NAME = BLOCK = "growth"
DEFINITIONS = (1000, 100_000, 1_000_000)
CODE_OCTETS = 950
WORKERS = 2
STARTS = 3
CHANGES = 5
RATE = 1000
LOAD_SECONDS = 5
PATIENCE_SECONDS = 180
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Growth:
    """The figures at one size. Times are seconds unless the name says otherwise; 1 MB is 10**6 octets."""

    definitions: int
    snapshot_mb: float
    start: float
    """From the start of the process until every worker reports SERVING, the shortest of `STARTS`."""
    start_cpu: float
    """CPU time of the master and its children in the shortest start."""
    peak_mb: float
    """Largest resident memory of the master, the snapshot included, after its start and `CHANGES` changes."""
    worker_mb: float
    """Memory of one worker without the snapshot, its share of common pages included."""
    check_ms: float
    """A cycle that finds the table unchanged, the median of several."""
    cycle: float
    """The cycle that finds one changed row, until it is published: the median of `CHANGES`."""
    served: float
    """From COMMIT of that row until every worker serves it, with an interval of 1 s: the longest of `CHANGES`."""
    p99_ms: float
    """The P99 of calls at `RATE` a second while the table does not change."""
    slowest_ms: float
    """The slowest call at this rate while the changes are published."""
    failed: int
    """Calls that failed in both periods."""


HEADS: tuple[tuple[str, Callable[[Growth], str]], ...] = (
    ("definitions", lambda each: f"{each.definitions:,}"),
    ("snapshot", lambda each: f"{number(each.snapshot_mb)} MB"),
    ("start → SERVING", lambda each: f"{number(each.start)} s"),
    ("its CPU time", lambda each: f"{number(each.start_cpu)} s"),
    ("master's peak", lambda each: f"{number(each.peak_mb)} MB"),
    ("a worker's own", lambda each: f"{number(each.worker_mb)} MB"),
    ("change check", lambda each: f"{number(each.check_ms)} ms"),
    ("cycle with one changed row", lambda each: f"{number(each.cycle)} s"),
    ("COMMIT → served", lambda each: f"{number(each.served)} s"),
    ("P99 of a call", lambda each: f"{number(each.p99_ms)} ms"),
    ("slowest call beside a publication", lambda each: f"{number(each.slowest_ms)} ms"),
)


def measured(database: DatabaseServer, definitions: int) -> Growth:
    """The figures at ``definitions`` rows, in a database of its own that is dropped afterwards."""
    name = f"growth_{definitions}"
    table = Table(create_database(database.url, name))
    try:
        table.add_commands(definitions, CODE_OCTETS)
        table.run("VACUUM ANALYZE obex_dapl_functions")
        starts = []
        for _ in range(STARTS - 1):
            with _started(table) as (_, start):
                starts.append(start)
        with _started(table) as (server, start):
            return _of_running(server, table, definitions, min(*starts, start))
    finally:
        drop_database(database.url, name)


@contextmanager
def _started(table: Table) -> Iterator[tuple[ServerProcess, tuple[float, float]]]:
    """A server on all of its workers, and the seconds and the CPU time that its start took."""
    server = ServerProcess(
        table.url, WORKERS=str(WORKERS), SYNC_INTERVAL_SECONDS="1", STATEMENT_TIMEOUT_SECONDS=str(PATIENCE_SECONDS)
    )
    try:
        seconds = start_to_serving(server)
        yield server, (seconds, _cpu_seconds(server))
    finally:
        server.end()


def _of_running(server: ServerProcess, table: Table, definitions: int, start: tuple[float, float]) -> Growth:
    checks = [_next_check(server) for _ in range(CHANGES)]
    with load_process(server.port, RATE, definitions) as finish:
        time.sleep(LOAD_SECONDS)  # only the measured period
        quiet = finish()
    with load_process(server.port, RATE, definitions) as finish:
        changes = [_changed(server, table, change) for change in range(CHANGES)]
        beside = finish()
    return Growth(
        definitions, server.statusz()["catalog"]["bytes"] / 1e6, *start, _peak_mb(server.pid),
        max(pss_beyond_snapshot(pid) for pid in server.worker_pids()) * 1.048576, statistics.median(checks) * 1000,
        statistics.median(cycle for cycle, _ in changes), max(served for _, served in changes), quiet["p99"],
        beside["max"], quiet["failed"] + beside["failed"],
    )  # fmt: skip


def _next_check(server: ServerProcess) -> float:
    """Seconds of the next cycle that finds the table unchanged."""
    before = server.statusz()["sync"]["cycles"]["unchanged"]
    until(lambda: server.statusz()["sync"]["cycles"]["unchanged"] > before, server.tail, seconds=PATIENCE_SECONDS)
    return float(server.statusz()["sync"]["last_duration_seconds"])


def _changed(server: ServerProcess, table: Table, change: int) -> tuple[float, float]:
    """Change one row. Returns the seconds of the cycle that publishes it, and of COMMIT to the last worker."""
    generation = server.statusz()["catalog"]["generation"] + 1
    table.run("UPDATE obex_dapl_functions SET code = %s WHERE name = 'command7'", (f"changed = {change}",))
    committed = time.monotonic()
    until(partial(_all_serve, server, generation), server.tail, seconds=PATIENCE_SECONDS)
    served = time.monotonic() - committed
    return server.wait_log("Definitions Broadcasted", generation=generation)["duration_ms"] / 1000, served


def _all_serve(server: ServerProcess, generation: int) -> bool:
    return {worker["generation"] for worker in server.statusz()["workers"]} == {generation}


def _cpu_seconds(server: ServerProcess) -> float:
    """CPU time of the master, its workers and its checker, and of their children that have exited."""
    used = 0
    for pid in (server.pid, *server.worker_pids(), *server.checker_pids()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime: proc_pid_stat(5)
    return used / _TICKS


def _peak_mb(pid: int) -> float:
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) * 1024 / 1e6


def table_of(found: Sequence[Growth], link: str) -> str:
    """The figures side by side in Markdown, one column for each size; ``link``: the record, from the page."""
    rows = [[head, *(show(each) for each in found)] for head, show in HEADS]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" + "|--:" * len(found) + "|")
    failed = sum(each.failed for each in found)
    return f"[Record]({link}); calls that failed: {failed}.\n\n" + "\n".join(lines) + "\n"


def newest_table(page: Path) -> str:
    """The text of ``page`` with the table of the newest record in it.

    Raises:
        OSError: if there is no record.
        ValueError: if the page has no place for the table.
    """
    file = newest(NAME)
    if file is None:
        raise FileNotFoundError(f"no record {NAME} in perf/results: run `python -m perf growth`")
    found = [Growth(**each) for each in json.loads(file.read_text(encoding="utf-8"))["sizes"]]
    return replaced(page.read_text(encoding="utf-8"), BLOCK, table_of(found, f"../perf/results/{file.name}"))


def main(given: Sequence[str] | None = None) -> int:
    """Measure and store the record, or write the table. Returns 1 if a required server or record is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m perf growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--definitions", type=int, nargs="+", default=DEFINITIONS)
    parser.add_argument("--page", type=Path, help="measure nothing; write the newest record's table into this page")
    arguments = parser.parse_args(given)
    try:
        if arguments.page is not None:
            arguments.page.write_text(newest_table(arguments.page), encoding="utf-8")
            return 0
        database = any_provider_or_skip()
    except (OSError, ValueError, pytest.skip.Exception) as error:
        print(f"nothing written: {error}", file=sys.stderr)
        return 1
    facts, found = machine.facts() | machine.versions(), []
    try:
        for definitions in arguments.definitions:
            found.append(measured(database, definitions))
            print(found[-1], flush=True)
    finally:
        database.close()
    record = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"), "code_octets": CODE_OCTETS, "workers": WORKERS,
        "database": database.name, "machine": facts | machine.after(), "sizes": [asdict(each) for each in found],
    }  # fmt: skip
    print(f"stored in {keep(record, NAME).name}")
    return 0
