"""The cost of the row gate, and the effect that a first check of a large catalogue has on other clients.

    python -m perf gate [--rows N] [--pairs N] [--seconds S] [--one-cpu]

*Cost*: 100 of the rows have changed. The figures are the CPU time of the master's part, that of the checker, and the
time until all rows are judged. They work one after the other, so on a quiet machine the time is about the CPU time of
both. *Beside*: a server with one worker has just started, and judges its rows while it serves. The checker process is
stopped and continued in turn: in each round a victim is measured alone, beside the check, and alone again. The two
figures of the victim alone are compared too, which shows how much the machine varies. The record goes to
``perf/results/``.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tests.support import wire
from tests.support.client import Client
from tests.support.polling import until
from tests.support.providers import any_provider_or_skip, create_database
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.content_check import MODULE
from definition_server.catalog.definition import Row as TableRow
from definition_server.catalog.gate import Gate
from definition_server.control_plane.background import Background
from definition_server.control_plane.checker import Checker, Content
from definition_server.control_plane.row_gate import RowGate
from perf.benches.attack_stage import Child, child
from perf.benches.figures import Figures, Row
from perf.generator.victim import VictimJob
from perf.targets.processes import checkers, on_cpu, scheduled
from perf.targets.target import SERVER_CPU, TargetFailed

CODE_OCTETS = 2000
CHANGED = 100
ROUNDS = 7
GATE_MS = 50.0
P99_RATIO = 1.5
PHASES = ("before", "beside", "after")
_PAUSE = 0.3
_SOME_WORK = 0.005
_PATIENCE = 15.0
_START_SECONDS = 120.0
NAME = "command7"


def rows(count: int, round_: int) -> list[TableRow]:
    """A table in which `CHANGED` rows differ in each round."""
    line = "value = args.get('target')\n" * (CODE_OCTETS // 28)
    every = max(1, count // CHANGED)
    return [
        TableRow(
            number + 1, b"command%d" % number, b"function", b'[{"item": "target", "type": "var"}]',
            f"# {number} {0 if number % every else round_}\n{line}".encode(),
        )
        for number in range(count)
    ]  # fmt: skip


async def cost(count: int) -> list[tuple[float, float, float]]:
    """The cost of the gate in each of `ROUNDS`, in ms: CPU time of this process, CPU time of the checker, elapsed
    time."""
    gate, checker, background = Gate(), Checker(), Background()
    row_gate = RowGate(gate, checker, background=background, logs=False)
    first = SnapshotBuilder()
    first.add(rows(count, 0))
    gate.served, gate.first = first.digests(), False
    await checker.check([Content(MODULE, b"warm", b"[]", b"pass")])
    taken = []
    try:
        for number in range(1, ROUNDS + 1):
            builder = SnapshotBuilder(None, row_gate.served)
            builder.add(rows(count, number))
            assert checker.pid is not None
            cpu, ran, began = time.process_time(), scheduled(checker.pid)[0], time.monotonic()
            await row_gate.apply(builder, None)
            whole = time.monotonic() - began
            ran, cpu = scheduled(checker.pid)[0] - ran, time.process_time() - cpu
            taken.append((cpu * 1000, ran * 1000, whole * 1000))
    finally:
        await row_gate.close()
        background.close()
    return taken


def measure_cost(count: int, figures: Figures) -> None:
    """Record the cost of the gate."""
    taken = asyncio.run(cost(count))
    what = f"gate, {CHANGED} of {count:,} rows changed"
    cpu, ran, whole = zip(*taken, strict=True)
    both = [one + other for one, other in zip(cpu, ran, strict=True)]
    figures.note(f"{what}: CPU time of the master, least", min(cpu), "ms")
    figures.note(f"{what}: CPU time of the master, median", statistics.median(cpu), "ms", GATE_MS)
    figures.note(f"{what}: CPU time of the checker, median", statistics.median(ran), "ms")
    figures.note(f"{what}: CPU time of both, median", statistics.median(both), "ms", GATE_MS)
    figures.note(f"{what}: until all are judged, least", min(whole), "ms")
    figures.note(f"{what}: until all are judged, median", statistics.median(whole), "ms")


def measure_beside(server: ServerProcess, arguments: argparse.Namespace, figures: Figures) -> None:
    """Record the victim's latencies, alone and during the check."""
    (checker,) = until(lambda: [each for each in checkers(server.pid) if _is_patient(each)], "the rest is judged")
    with Client(server.port) as client:
        content = client.raw("GetCommand", wire.command_request(NAME.encode()))
    job = VictimJob(server.port, KEY, NAME, content.hex())
    with child("perf.generator.victim", job.to_json()) as victim:
        if not victim.read(_START_SECONDS):
            raise TargetFailed("the victim does not start")
        try:
            shares = _rounds(server, checker, victim, arguments)
        finally:
            with suppress(ProcessLookupError):
                os.kill(checker, signal.SIGCONT)
        result = victim.end()["result"]
    figures.note("rounds of measurements while rows were judged", len(shares), "")
    figures.note("checker's share of a CPU beside the victim, median", 100 * statistics.median(shares), "%")
    for kind in ("steady", "connect"):
        found = {phase: [result[f"{phase}{number}"][kind] for number in range(len(shares))] for phase in PHASES}
        failed = sum(each["failed"] for measured in found.values() for each in measured)
        figures.note(f"{kind}: failed", failed, "", 0)
        for name in ("p50", "p99"):
            before, beside, after = ([each[name] for each in found[phase]] for phase in PHASES)
            figures.note(f"{kind}: {name} alone, median", statistics.median(before + after), "ms")
            figures.note(f"{kind}: {name} beside the check, median", statistics.median(beside), "ms")
            figures.add(judged(f"{kind}: {name}", before, beside, after, promised=(kind, name) == ("steady", "p99")))


def judged(what: str, before: list[float], beside: list[float], after: list[float], *, promised: bool) -> Row:
    """The median of the rounds' ratios, each between a figure during the check and the same figure alone just before
    and after it.

    The two figures alone show how much the machine itself varies. If this variation is as large as the limit, there is
    no verdict.
    """
    noise = statistics.median(max(one / other, other / one) for one, other in zip(before, after, strict=True))
    ratios = [two / math.sqrt(one * three) for one, two, three in zip(before, beside, after, strict=True)]
    row = Row(f"{what} beside ÷ alone, median of rounds", "×", round(statistics.median(ratios), 3))
    row.detail = {"ratios": [round(each, 3) for each in ratios], "alone ÷ alone": round(noise, 3)}
    if promised:
        row.most = P99_RATIO
        if noise >= P99_RATIO:
            row.value = None
            row.error = f"two measurements alone differ by × {noise:.2f} too: the machine is not quiet"
    return row


def _is_patient(pid: int) -> bool:
    """Whether a checker process is the one that judges rows while the server serves."""
    return os.sched_getscheduler(pid) == os.SCHED_IDLE


def _rounds(server: ServerProcess, checker: int, victim: Child, arguments: argparse.Namespace) -> list[float]:
    """Measure the victim alternately alone and during the check, until all rows are judged or the rounds are over.

    Returns the checker's share of a CPU in each round. The checker pauses after each batch, and for longer if it was
    stopped meanwhile, so a round begins only when it works again.
    """
    shares = []
    for number in range(arguments.pairs):
        for phase in PHASES:
            victim.say(f"measure until-{phase}{number}")
            os.kill(checker, signal.SIGCONT if phase == "beside" else signal.SIGSTOP)
            time.sleep(_PAUSE)
            began, ran = time.monotonic(), scheduled(checker)[0]
            while phase == "beside" and scheduled(checker)[0] - ran < _SOME_WORK:
                if time.monotonic() - began > _PATIENCE:
                    raise TargetFailed("the checker does not run beside the victim: no CPU is free for it")
                time.sleep(_PAUSE / 10)
            ran = scheduled(checker)[0]
            victim.say(f"measure {phase}{number}")
            time.sleep(arguments.seconds)
            if phase == "beside":
                shares.append((scheduled(checker)[0] - ran) / arguments.seconds)
        if server.metric("avap_rows_unchecked") == 0:
            if number < 3:
                raise TargetFailed("all rows were judged before the victim was measured; give more --rows")
            return shares[:-1]
    return shares


def measure(url: str, arguments: argparse.Namespace, figures: Figures) -> None:
    """All figures."""
    measure_cost(arguments.rows, figures)
    table = Table(url)
    table.add_commands(arguments.rows, CODE_OCTETS)
    table.run("VACUUM ANALYZE obex_dapl_functions")
    server = ServerProcess(url, WORKERS="1", STATEMENT_TIMEOUT_SECONDS="30", SYNC_INTERVAL_SECONDS="600")
    if arguments.one_cpu:
        server.command = on_cpu(SERVER_CPU, server.command)
    with server:
        server.wait_ready(_START_SECONDS)
        try:
            measure_beside(server, arguments, figures)
        except (TargetFailed, OSError, ValueError) as error:
            figures.add(Row("a first check beside serving", "", most=P99_RATIO, error=str(error)))


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print the figures and store the record."""
    parser = argparse.ArgumentParser(
        prog="python -m perf gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=8, help="rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each (default: %(default)s)")
    parser.add_argument("--one-cpu", action="store_true", help="the whole server on one CPU")
    arguments = parser.parse_args(given)
    details: dict[str, Any] = vars(arguments) | {"code_octets": CODE_OCTETS}
    figures = Figures("the row gate", details)
    database = any_provider_or_skip()
    try:
        measure(create_database(database.url, "row_gate"), arguments, figures)
    finally:
        database.close()
    return figures.close("row-gate")
