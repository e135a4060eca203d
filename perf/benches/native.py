"""The cost of the native transport: ``python -m perf native [--quick] [--only TEXT] [--transport grpcio]``.

The server runs on one CPU, the generators on another. A figure "per core" is answers per second of the server's own CPU
time, read from /proc, so it does not depend on the speed of the generator. If the server is not busy all the time, the
figure is the cost of work in small batches. Figures that are compared are measured in interleaved runs, of which the
median counts. Every promise of the transport is a row; the record goes to ``perf/results/``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import wire
from tests.support.attacks import ATTACKS, HONEST

from perf.benches.figures import Figures, Row
from perf.benches.victim import VICTIM, VictimMeasurements
from perf.generator.run import run as generate
from perf.generator.scenarios import Scenario
from perf.targets.catalogue import Catalogue, name_of
from perf.targets.processes import private
from perf.targets.target import (
    Target,
    TargetFailed,
    Worker,
    h2load,
    keep_to_client_cpu,
    nghttpd,
    raise_descriptor_limit,
    self_signed,
    worker,
)  # fmt: skip

ANSWER = 1500
PATH = wire.GET_COMMAND.decode()
PER_CORE = "req/s per core"
FAILURES = (TargetFailed, OSError, subprocess.SubprocessError)
TURNS = 3
MB = 1 << 20

Result = dict[str, Any]


@dataclass
class Bench:
    """The catalogues and settings that all rows use."""

    figures: Figures
    transport: str
    seconds: float
    """The duration of one measurement."""
    folder: Path
    catalogue: Catalogue
    large: Catalogue
    larger: Catalogue
    """The catalogue ``large`` with one changed definition."""

    def worker(self, catalogue: Catalogue, transport: str = "", **settings: Any) -> Any:
        """A worker that serves ``catalogue``."""
        return worker(transport or self.transport, catalogue.descriptor, catalogue.built, **settings)

    @property
    def request(self) -> Path:
        """A file with the request for one definition, as a gRPC message."""
        return self.folder / "request"

    def add(self, name: str, unit: str, how: Callable[[], tuple[float, Any]], **promise: float | None) -> Row:
        """Measure a row."""
        return self.figures.measure(
            Row(name, unit, least=promise.get("least"), most=promise.get("most")), how, *FAILURES
        )

    def ratio(self, name: str, value: str, other: str, least: float) -> None:
        """A row that divides two others."""
        upper, lower = self.figures.value(value), self.figures.value(other)
        missing = "" if upper and lower else "a figure is missing"
        quotient = upper / lower if upper and lower else None
        self.figures.add(Row(name, "×", quotient, least=least, error=missing))


def median(results: list[Result], key: str = "per_server_cpu_second") -> tuple[float, list[Result]]:
    """The median of the results, and all results as details."""
    return statistics.median(result[key] for result in results), results


def steady(target: Target, path: str, connections: int, streams: int, seconds: float, **more: Any) -> Result:
    """Run h2load for about ``seconds``. A short run before it determines the number of requests, and warms the server
    up."""
    shortest = h2load(target, path, 20 * connections * streams, connections, streams, **more)
    probe = h2load(target, path, max(100, int(shortest["rate"] * 0.3)), connections, streams, **more)
    return h2load(target, path, max(100, int(probe["rate"] * seconds)), connections, streams, **more)


def load(target: Target, catalogue: Catalogue, kind: str, **more: Any) -> Result:
    """One run by our own generator, which checks every answer.

    Raises:
        TargetFailed: if the run is not valid.
    """
    scenario = Scenario("native-bench", "", "", kind, rate=more.pop("rate", 0.0))
    run = generate(target, scenario, catalogue, **more)
    if not run["valid"]:
        raise TargetFailed(run["reason"])
    return {name: value for name, value in run.items() if name != "histogram"}


def hot(bench: Bench) -> None:
    """GetCommand beside nghttpd and grpcio, in interleaved runs."""
    shapes = {"8 × 32": (8, 32, 250_000), "8 × 1": (8, 1, 70_000)}
    results: dict[str, list[Result]] = {}
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        served = stack.enter_context(bench.worker(bench.catalogue)).target
        reference = stack.enter_context(bench.worker(bench.catalogue, "grpcio")).target
        file = stack.enter_context(nghttpd(bench.folder))
        grpc = {"octets": ANSWER + 5, "request": bench.request}
        for turn in range(TURNS):
            for shape, (connections, streams, _) in shapes.items():
                for name, target, path, more in (
                    ("GetCommand", served, PATH, grpc),
                    ("nghttpd, a file of that size", file, "/answer", {"octets": ANSWER + 5}),
                    ("GetCommand on grpcio", reference, PATH, grpc),
                ):
                    if target is reference and turn > 1:
                        continue
                    try:
                        run = steady(target, path, connections, streams, bench.seconds, **more)
                        results.setdefault(f"{name}, {shape}", []).append(run)
                    except FAILURES as error:
                        errors[f"{name}, {shape}"] = str(error)[:300]
    for shape, (_, _, least) in shapes.items():
        for name in ("GetCommand", "nghttpd, a file of that size", "GetCommand on grpcio"):
            row = Row(f"{name}, {shape}", PER_CORE, least=float(least) if name == "GetCommand" else None)
            row.error = errors.get(row.name, "")
            if row.name in results:
                row.value, row.detail = median(results[row.name])
            bench.figures.add(row)
        ours, theirs = f"GetCommand, {shape}", f"nghttpd, a file of that size, {shape}"
        bench.ratio(f"GetCommand ÷ nghttpd, {shape}", ours, theirs, 0.8)
    bench.ratio("GetCommand ÷ grpcio, 8 × 32", "GetCommand, 8 × 32", "GetCommand on grpcio, 8 × 32", 40)


def checked(bench: Bench) -> None:
    """Measure calls whose answers our own generator compares octet by octet: found, not found, unauthenticated, with
    deadlines."""
    rows: list[tuple[str, float | None, dict[str, Any]]] = [
        ("GetCommand, one definition, every answer checked", None, {"names": "one"}),
        ("GetCommand, 1,000 definitions in turn", None, {}),
        ("a fresh deadline per call, as grpc-go sends it", 60_000, {"deadlines": 10_000}),
        ("a deadline that never repeats", 60_000, {"deadlines": 100_000}),
        ("as grpc-go: deadline, WINDOW_UPDATE and PING", None, {"deadlines": 10_000, "acknowledge": True}),
        ("404, one name", 100_000, {"unknown": 1.0, "unknown_names": 1}),
        ("404, 20,000 names in turn", 100_000, {"unknown": 1.0}),
        ("401, a wrong key", 100_000, {"bad_key": 1.0}),
    ]
    with bench.worker(bench.catalogue) as served:
        for name, least, job in rows:

            def runs(job: dict[str, Any] = job) -> tuple[float, list[Result]]:
                return median(
                    [load(served.target, bench.catalogue, "closed", seconds=bench.seconds, **job) for _ in range(2)]
                )

            bench.add(f"{name}, 8 × 32", PER_CORE, runs, least=least)


def tls(bench: Bench) -> None:
    """GetCommand over TLS."""

    def measured() -> tuple[float, Any]:
        with bench.worker(bench.catalogue, **self_signed(bench.folder)) as served:
            more = {"octets": ANSWER + 5, "request": bench.request, "tls": True}
            return median([steady(served.target, PATH, 8, 32, bench.seconds, **more) for _ in range(2)])

    bench.add("GetCommand over TLS, 8 × 32", PER_CORE, measured, least=60_000)


def catalogue(bench: Bench) -> None:
    """SyncCatalog, one whole catalogue after another."""

    def measured() -> tuple[float, Any]:
        with bench.worker(bench.large) as served:
            result = load(served.target, bench.large, "sync", connections=1, seconds=bench.seconds)
        return result["octets_per_server_cpu_second"] / 1e9, result

    size = bench.large.built.footer.body_length / 1e6
    bench.add(f"SyncCatalog of {size:.0f} MB", "GB/s per core", measured, least=1.0)


def scheduled(bench: Bench) -> None:
    """35,000 calls a second on one worker, without publications and while 100,000 definitions are published."""
    job: dict[str, Any] = {"kind": "open", "spread": 997, "connections": 64, "rate": 35_000.0, "warmup": 1.0}
    with bench.worker(bench.large) as served:
        runs: list[Result] = []
        error = ""
        for _ in range(TURNS):
            try:
                runs.append(load(served.target, bench.large, seconds=2 * bench.seconds, **job))
            except FAILURES as failure:
                error = str(failure)[:300]
        for percentile, most in (("p50", None), ("p95", 1.0), ("p99", 2.0), ("p999", None), ("max", None)):
            row = Row(f"35,000 req/s on a schedule, 64 connections: {percentile}", "ms", most=most)
            if runs:
                row.value = statistics.median(run["latency"][percentile] for run in runs)
                row.detail = runs if percentile == "p95" else None
            else:
                row.error = error
            bench.figures.add(row)
        slowest = "the slowest call while 100,000 definitions are published, above that at rest"
        bench.add(slowest, "ms", lambda: publishing(bench, served, job, 1), most=5.0)
        last = f"{slowest}, the worker being the last to hold the old ones"
        bench.add(last, "ms", lambda: publishing(bench, served, job, 100, keep=False))


def publishing(
    bench: Bench, served: Worker, job: dict[str, Any], generation: int, *, keep: bool = True
) -> tuple[float, Any]:
    """Measure pairs of runs, without and with publications. The result is the median of the differences of their
    slowest calls.

    The generations are built and sealed beforehand: on two CPUs the master's work would slow the generator down.
    Without ``keep``, no process but the worker holds the generation that it serves, so the worker frees 200 MB of
    memory when it switches to the next.
    """
    differences, details = [], []
    kept: list[int] = []

    def publish(made: list[tuple[int, Any]]) -> None:
        for descriptor, built in made:
            time.sleep(bench.seconds / 5)
            served.publish(descriptor, built)
            if not keep:
                os.close(descriptor)

    for _ in range(TURNS):
        slowest = []
        for publications in (0, 3):
            made = []
            for number in range(publications):
                generation += 1
                made.append((bench.larger, bench.large)[number % 2].generation(generation))
            kept += [descriptor for descriptor, _ in made if keep]
            measuring = partial(publish, made)
            result = load(served.target, bench.large, seconds=bench.seconds, measuring=measuring, **job)
            slowest.append(result["latency"]["max"])
            details.append({"publications": publications, **result})
        differences.append(slowest[1] - slowest[0])
    for descriptor in kept:
        os.close(descriptor)
    return statistics.median(differences), {"differences_ms": differences, "runs": details}


def idle(bench: Bench) -> None:
    """10,000 idle connections."""
    count = min(10_000, raise_descriptor_limit() - 200)
    measured: Result = {}

    def held() -> tuple[float, Any]:
        with bench.worker(bench.catalogue) as served:
            once = partial(load, served.target, bench.catalogue, "closed", seconds=bench.seconds)
            before = [once() for _ in range(TURNS)]
            during = [once(idle=count) for _ in range(TURNS)]
        measured.update(before=before, during=during)
        # Only the first measurement is used, because later connections use memory that the worker has kept.
        return during[0]["idle"]["resident_kb_each"], {"connections": count}

    def kept() -> tuple[float, Any]:
        if not measured:
            raise TargetFailed("no measurement")
        return median(measured["during"])[0] / median(measured["before"])[0], measured

    bench.add(f"{count:,} idle connections: resident memory of each", "kB", held, most=10.0)
    bench.add("throughput of 8 busy connections beside them", "× before", kept, least=0.9)


def attacks(bench: Bench) -> None:
    """Measure every attack of the list by one client, and its effect on the calls of another client.

    The load of the machine changes within seconds, so each measurement of the victim under attack lies between two of
    the victim alone. The judged figure is the median of the former divided by the median of the latter; other load on
    the machine raises both. Attacks whose figure is near the limit are measured more often. An honest client at full
    rate is measured too, because every client of a busy core has to wait. Each row's detail has the ratio. Latency ends
    in the client's kernel (`perf.benches.victim.VICTIM`).
    """
    names = [name for name in ATTACKS if name != HONEST]
    with bench.worker(bench.large) as served:
        job = VICTIM | {"seconds": max(1.0, bench.seconds / 2)}
        victim = VictimMeasurements(served, partial(load, served.target, bench.large, **job), FAILURES)
        for _ in range(_ATTACKS_TURNS):
            victim.take((HONEST, *names))
        close = [name for name in names if victim.seen(name) and victim.ratio(name) > _CLOSE]
        for _ in range(_MORE_TURNS):
            victim.take(close)
        alive = served.alive
        end = {"private_mb": private(served.target.pid) / MB} if alive else {}

    bench.add("a victim's P99 without an attack", "ms", victim.calm)
    bench.add("a victim's P99 beside an honest client at full rate", "× calm", partial(victim.row, HONEST))
    for name in names:
        row = bench.add(f"{name}: a victim's P99", "× calm", partial(victim.row, name), most=_BESIDE_AN_ATTACK)
        row.detail = {"attack": ATTACKS[name].what, "turns": row.detail}
        if victim.seen(name) and victim.seen(HONEST):
            row.detail["of_what_an_honest_client_makes"] = victim.ratio(name) / victim.ratio(HONEST)
        grown = victim.grown(name)
        bench.figures.add(Row(f"{name}: memory grown", "MB", grown, most=64.0))
    bench.figures.add(Row("worker alive after all attacks", "", float(alive), least=1, detail=end))


_BESIDE_AN_ATTACK = 3.0
"""The promised limit, as a multiple of the victim's P99 without an attack."""
_CLOSE = 0.5 * _BESIDE_AN_ATTACK
_ATTACKS_TURNS, _MORE_TURNS = 5, 4


PARTS: dict[str, Callable[[Bench], None]] = {
    "hot": hot, "checked": checked, "tls": tls, "catalogue": catalogue, "scheduled": scheduled, "idle": idle,
    "attacks": attacks,
}  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    """Measure, store the record, print the figures. Returns 1 if a promise is not kept."""
    parser = argparse.ArgumentParser(
        prog="python -m perf native", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="short measurements, which test the measurement itself, not the speed"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="measure only this part; may be repeated")
    parser.add_argument("--transport", default="native")
    parser.add_argument("--name", default="native", help="name of the record's file, after the date")
    arguments = parser.parse_args(given)
    keep_to_client_cpu()
    raise_descriptor_limit()
    figures = Figures("native transport", vars(arguments))
    seconds = 0.6 if arguments.quick else 2.5
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "answer").write_bytes(bytes(ANSWER + 5))
        (folder / "request").write_bytes(wire.message(wire.command_request(name_of(0).encode())))
        rows = 10_000 if arguments.quick else 100_000
        made = [Catalogue(1000, ANSWER), Catalogue(rows, 2000), Catalogue(rows, 2000, variant=1)]
        try:
            bench = Bench(figures, arguments.transport, seconds, folder, *made)
            for name, part in PARTS.items():
                if not arguments.only or name in arguments.only:
                    part(bench)
        finally:
            for each in made:
                each.close()
    return figures.close(arguments.name)
