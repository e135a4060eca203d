"""The load of a server on its database: ``python -m perf database`` measures a change check and a reading of all rows.

The queries are the server's own (`PostgresSource`), on a real PostgreSQL. A time is the shortest of several, because
other work on the machine can only lengthen it. The record goes to ``perf/results/<date>-database-cost.json``; `costs`
reads the newest one. Needs a PostgreSQL provider of the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import pytest
from tests.support.providers import any_provider_or_skip, create_database
from tests.support.proxy import Proxy
from tests.support.results import keep, newest
from tests.support.table import Table

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.control_plane.postgres import PostgresSource

NAME = "database-cost"
DEFINITIONS = (1000, 100_000)
CODE_OCTETS = 2000
TURNS = 7


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one catalogue. A change check and a reading are seconds of one core of an idle database."""

    definitions: int
    look_cpu_seconds: float
    """Seconds from BEGIN to ROLLBACK. All of it counts as CPU time of the database, because nearly all of it is the
    scan."""
    look_octets: float
    read_seconds: float
    octets: float
    """Octets that the database sends for a reading."""
    build_seconds: float
    """Seconds from the last row to a snapshot that is ready to be published."""


def costs() -> tuple[dict[int, Cost], str]:
    """Definitions → cost, from the newest record, and the record's name.

    Raises:
        OSError: if there is no record.
    """
    file = newest(NAME)
    if file is None:
        raise FileNotFoundError(f"no record {NAME} in perf/results: run `python -m perf database`")
    record = json.loads(file.read_text(encoding="utf-8"))
    return {entry["definitions"]: Cost(**entry) for entry in record["costs"]}, file.name


async def _measured(url: str, proxy: Proxy, definitions: int) -> Cost:
    source = PostgresSource(url, connect_timeout=10, statement_timeout=60)
    checks, reads, builds, moved = [], [], [], []
    try:
        async with source.read():  # this connects, and makes the database read its table once
            pass
        for _ in range(TURNS):
            sent, began = proxy.bytes_from_database, time.perf_counter()
            async with source.read():
                pass
            checks.append(time.perf_counter() - began)
            look_octets = proxy.bytes_from_database - sent
        for _ in range(TURNS if definitions < 10_000 else 3):
            builder = SnapshotBuilder()
            sent, began = proxy.bytes_from_database, time.perf_counter()
            async with source.read() as reading:
                batches = [batch async for batch in reading.batches()]
            reads.append(time.perf_counter() - began - min(checks))
            moved.append(proxy.bytes_from_database - sent)
            began = time.perf_counter()
            for batch in batches:
                builder.add(batch)
            builder.build(generation=1, created_at_ns=0)
            builds.append(time.perf_counter() - began)
    finally:
        await source.close()
    figures = (min(checks), float(look_octets), min(reads), float(min(moved)), min(builds))
    return Cost(definitions, *(round(figure, 4) for figure in figures))


def main(given: Sequence[str] | None = None) -> int:
    """Measure and store the record. Returns 1 if there is no PostgreSQL."""
    parser = argparse.ArgumentParser(
        prog="python -m perf database", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(given)
    found = []
    try:
        database = any_provider_or_skip()
    except pytest.skip.Exception as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 1
    try:
        for count in DEFINITIONS:
            table = Table(create_database(database.url, f"cost_{count}"))
            table.add_commands(count, CODE_OCTETS)
            table.run("VACUUM ANALYZE obex_dapl_functions")
            with Proxy(table.url) as proxy:
                found.append(asyncio.run(_measured(proxy.url, proxy, count)))
            print(found[-1], flush=True)
    finally:
        database.close()
    record = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_octets": CODE_OCTETS,
        "database": database.name,
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "load_after": os.getloadavg()},
        "costs": [asdict(cost) for cost in found],
    }
    print(f"stored in {keep(record, NAME).name}")
    return 0
