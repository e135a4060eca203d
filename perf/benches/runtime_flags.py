"""The effect of the server's runtime flags: ``python -m perf flags [--keep] [--rounds N]``.

docs/runtime-flags.md lists the flags; all of its figures come from the record that this command writes:

``bytecode``   seconds until every worker serves, with the bytecode of all modules and without any of it;
``warm-up``    the first calls of a fresh server, each on its own connection, with the warm-up and without;
``collector``  pauses of the garbage collector in a worker under load and while connections open and close: with the
               server's own settings (a collection and ``gc.freeze`` at the end of the warm-up), without freezing, with
               Python's thresholds, with much higher ones, and with the collector disabled;
``memory``     resident octets of the master after publications of a large catalogue, with the C library's default
               number of memory arenas, and with fewer.

The variants are measured in interleaved runs, so that other load on the machine affects all of them. Every server is a
whole one, on a real PostgreSQL; `perf/benches/flags/sitecustomize.py` makes the variants and records their events. The
measurement needs h2load, PostgreSQL and a quiet machine. Each part of the record names its own time and machine,
because a part can be measured again alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from struct import unpack
from typing import Any

import pytest
from tests.support import machine, wire
from tests.support.providers import any_provider_or_skip, create_database
from tests.support.results import RESULTS
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

from perf.targets import processes

PROBE = Path(__file__).parent / "flags"
TRANSPORTS = ("native", "grpcio")
COLLECTOR = ("as it is", "no freeze", "usual collections", "rare collections", "no collections")
COMMANDS = 1000
FIRST_CALLS = 5
LARGE, LARGE_OCTETS, PUBLICATIONS = 30_000, 2000, 12
STEADY_CALLS, CHURNS, CHURN_CONNECTIONS = 100_000, 10, 100


@contextmanager
def server(
    url: str, transport: str, variant: str = "as it is", **settings: str
) -> Iterator[tuple[ServerProcess, Path]]:
    """A running server that contains the probe, and the directory to which its workers write when they end."""
    with tempfile.TemporaryDirectory() as out:
        settings = {"WORKERS": "1", "TRANSPORT": transport, "SYNC_INTERVAL_SECONDS": "3600"} | settings
        settings |= {"PYTHON_FLAGS_VARIANT": variant, "PYTHON_FLAGS_OUT": out}
        process = ServerProcess(url, **settings)
        process.environment["JAIL"] = "off"  # the probe writes a file when a worker ends
        process.environment["PYTHONPATH"] = f"{PROBE}:{process.environment.get('PYTHONPATH', '')}".rstrip(":")
        with process:
            process.wait_ready()
            yield process, Path(out)


# -- bytecode ----------------------------------------------------------------------------------------------------------


def start_seconds(url: str, *, bytecode: bool) -> float:
    """Seconds from the start of the process until it logs that every worker serves."""
    with tempfile.TemporaryDirectory() as empty:
        flags = {} if bytecode else {"PYTHONPYCACHEPREFIX": empty, "PYTHONDONTWRITEBYTECODE": "1"}
        with ServerProcess(url, WORKERS="2", SYNC_INTERVAL_SECONDS="3600", **flags) as process:
            began = time.monotonic()
            process.wait_ready()
            return time.monotonic() - began


def bytecode(url: str, rounds: int) -> dict[str, Any]:
    """Seconds until every worker serves."""
    found: dict[str, list[float]] = {"with bytecode": [], "without": []}
    start_seconds(url, bytecode=True)  # this compiles every module that has not been compiled yet
    for _ in range(rounds):
        found["with bytecode"].append(start_seconds(url, bytecode=True))
        found["without"].append(start_seconds(url, bytecode=False))
    return {name: spread(values) for name, values in found.items()}


# -- warm-up -----------------------------------------------------------------------------------------------------------


def call_seconds(port: int) -> float:
    """Seconds of one GetCommand on its own open connection, from sending the request to the end of the answer."""
    fields = wire.call_fields(b"127.0.0.1", wire.GET_COMMAND, KEY.encode())
    request = wire.frame(wire.HEADERS, wire.END_HEADERS, 1, wire.literal_block(fields)) + wire.frame(
        wire.DATA, wire.END_STREAM, 1, wire.message(wire.command_request(b"command1"))
    )
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        # Without this option the request would wait for the acknowledgement of the octets sent before: 40 ms on the
        # loopback.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(wire.opening())
        stream = connection.makefile("rb")
        while _frame(stream)[0] != wire.SETTINGS:
            pass
        connection.sendall(wire.frame(wire.SETTINGS, wire.ACK, 0))
        began = time.perf_counter()
        connection.sendall(request)
        while True:
            kind, flags, number, payload = _frame(stream)
            if number == 1 and flags & wire.END_STREAM:
                break
        seconds = time.perf_counter() - began
        stream.close()
    if kind != wire.HEADERS or not payload:
        raise ValueError("the answer did not end with trailers")
    return seconds


def _frame(stream: Any) -> tuple[int, int, int, bytes]:
    head = stream.read(wire.HEAD)
    if len(head) < wire.HEAD:
        raise ConnectionError("the server closed the connection")
    length, kind, flags, number = int.from_bytes(head[:3]), *unpack(">BBI", head[3:])
    return kind, flags, number & 0x7FFFFFFF, stream.read(length)


def warm_up(url: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of the first calls, one row for each transport and variant; modules imported while clients wait."""
    found: dict[str, Any] = {}
    for transport in TRANSPORTS:
        calls: dict[str, list[list[float]]] = {"as it is": [], "no warm-up": []}
        late = {}
        for _ in range(rounds):
            for variant, lists in calls.items():
                with server(url, transport, variant) as (process, out):
                    lists.append([call_seconds(process.port) * 1000 for _ in range(FIRST_CALLS)])
                    process.end()
                    late[variant] = len(_worker(out)["late_modules"])
        for variant, lists in calls.items():
            found[f"{transport}, {variant}"] = {
                "first_ms": spread([row[0] for row in lists]),
                "fifth_ms": spread([row[-1] for row in lists]),
                "modules_imported_while_clients_wait": late[variant],
            }
    return found


# -- collector ---------------------------------------------------------------------------------------------------------


def load(port: int, calls: int, connections: int) -> None:
    """Make calls by h2load, all of which must succeed."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(wire.message(wire.command_request(b"command1")))
        body.flush()
        headers = [f"x-avap-auth: {KEY}", "content-type: application/grpc", "te: trailers"]
        done = subprocess.run(
            ["h2load", f"-n{calls}", f"-c{connections}", "-m10", f"-d{body.name}",
             *(word for header in headers for word in ("-H", header)),
             f"http://127.0.0.1:{port}{wire.GET_COMMAND.decode()}"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    succeeded = re.search(r"(\d+) succeeded", done.stdout)
    if succeeded is None or int(succeeded[1]) != calls:
        raise RuntimeError(f"h2load: {done.stdout[-500:]}")


def collector(url: str, rounds: int) -> dict[str, Any]:
    """Collections and pauses in one worker, by transport and variant; all rounds together."""
    found: dict[str, Any] = {}
    for transport in TRANSPORTS:
        steady = STEADY_CALLS if transport == "native" else STEADY_CALLS // 10
        notes: dict[str, list[dict[str, Any]]] = {variant: [] for variant in COLLECTOR}
        for _ in range(rounds):
            for variant, lists in notes.items():
                with server(url, transport, variant) as (process, out):
                    load(process.port, steady, 16)
                    for _ in range(CHURNS):
                        load(process.port, CHURN_CONNECTIONS * 2, CHURN_CONNECTIONS)
                    resident = processes.resident(process.worker_pids()[0])
                    process.end()
                    lists.append(_worker(out) | {"resident_mb": resident / 2**20})
        for variant, lists in notes.items():
            found[f"{transport}, {variant}"] = _pauses(lists)
    return found


def _pauses(notes: list[dict[str, Any]]) -> dict[str, Any]:
    by_generation = {name: [pause for note in notes for pause in note["pauses"][name]] for name in "012"}
    return {
        "collections_a_run": {name: len(pauses) / len(notes) for name, pauses in by_generation.items()},
        "longest_ms": {name: round(max(pauses, default=0) * 1000, 3) for name, pauses in by_generation.items()},
        "all_pauses_ms_a_run": round(sum(map(sum, by_generation.values())) * 1000 / len(notes), 2),
        "a_full_collection_would_take_ms": round(statistics.median(note["full"] for note in notes) * 1000, 3),
        "frozen_objects": notes[-1]["frozen"],
        "tracked_objects": notes[-1]["tracked"],
        "resident_mb": round(statistics.median(note["resident_mb"] for note in notes), 1),
    }


def _worker(out: Path) -> dict[str, Any]:
    (file,) = out.glob("*.json")
    notes: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return notes


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(table: Table) -> dict[str, Any]:
    """Resident megabytes of the master after each publication, without the snapshot, and their maximum."""
    found = {}
    for name, flags in {"as it is": {}, "MALLOC_ARENA_MAX=2": {"MALLOC_ARENA_MAX": "2"}}.items():
        own, peaks = [], []
        with ServerProcess(table.url, WORKERS="1", SYNC_INTERVAL_SECONDS="0.2", **flags) as process:
            process.wait_ready()
            for number in range(PUBLICATIONS):
                processes.forget_peak(process.pid)
                before = len(process.lines)
                table.run("UPDATE obex_dapl_functions SET code = code || %s WHERE id = 1", (f"#{number}",))
                process.wait_log("Definitions Broadcasted", after=before)
                own.append(round(processes.private(process.pid) / 2**20, 1))
                peaks.append(round(processes.peak_resident(process.pid) / 2**20, 1))
        found[name] = {"own_mb_after_each": own, "peak_mb": peaks}
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    figures = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, 3) for name, value in figures.items()}


PARTS = ("bytecode", "warm-up", "collector", "memory")


def measure(part: str, rounds: int) -> dict[str, Any]:
    """Measure one part, on its own PostgreSQL and table."""
    database = any_provider_or_skip()
    try:
        table = Table(create_database(database.url, "flags"))
        table.add_commands(COMMANDS, 1500)
        if part == "bytecode":
            return bytecode(table.url, rounds)
        if part == "warm-up":
            return warm_up(table.url, rounds)
        if part == "collector":
            return collector(table.url, max(2, rounds // 3))
        table.add_commands(LARGE, LARGE_OCTETS, start=COMMANDS)
        return memory(table)
    finally:
        database.close()


def _about(part: str, rounds: int) -> dict[str, Any]:
    """The part, with the time, machine and revision of its measurement."""
    before = machine.facts()
    found = measure(part, rounds)
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": before | machine.after(),
        "versions": machine.versions(),
        "rounds": rounds,
        "found": found,
    }


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and with ``--keep`` write a record. Returns 1 if a required program or server is missing."""
    parser = argparse.ArgumentParser(prog="python -m perf flags")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", action="store_true", help="write perf/results/<date>-runtime-flags.json")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; default: all")
    arguments = parser.parse_args(given)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if shutil.which("h2load") is None:
        print("nothing measured: h2load is missing (Debian nghttp2-client)", file=sys.stderr)
        return 1
    try:
        parts = {part: _about(part, arguments.rounds) for part in arguments.parts or PARTS}
    except pytest.skip.Exception as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 1
    print(json.dumps({part: entry["found"] for part, entry in parts.items()}, indent=1))
    if arguments.keep:
        path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-runtime-flags.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(kept | parts, indent=1) + "\n", encoding="utf-8")
        print(f"stored in {path.name}")
    return 0
