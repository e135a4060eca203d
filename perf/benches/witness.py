"""Compares our generator with independent ones: the same server and the same load, measured by h2load and by ghz.

    python -m perf witness build    builds ghz (needs Go 1.26; witnesses/go.mod pins the version)
    python -m perf witness          compares and prints a table; exit code 1 if a difference is not explained

*Throughput* is compared on a server that is busy all the time, so that the server limits the rate. The cost of a call
depends on how many calls arrive together, which depends on how each generator reads. If the rates differ and the
server's CPU time per call differs in the same proportion, the generators have sent different batches and both have
counted correctly; the comparison then states that reason. *P95* is compared on two servers whose latency is known: with
ghz, on one at a rate far below the capacity of both sides (`delayed.py`), and with the known latency itself, on one at
the rated load (`perf.harness.slowed`, ``held``). Here no reason is accepted for a difference. Then our P95 is compared
with that of ghz on our own server at the rated load. There ghz measures mostly its own delays, because it takes some 80
µs of CPU time for a call and has one CPU for it. How much it adds is measured in the same run at the same rate, on the
server that holds every call for a known time. If ghz adds as much there as it shows more here, the comparison states
that reason; otherwise it disagrees.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tests.support import machine, wire
from tests.support.builds import BuildFailed, built, make, place
from tests.support.results import SCHEMA, keep

from perf.benches.delayed import delayed
from perf.generator.run import run as generate
from perf.generator.scenarios import Scenario
from perf.harness.slowed import HELD_SECONDS
from perf.targets.catalogue import Catalogue, name_of
from perf.targets.processes import on_cpu
from perf.targets.target import CLIENT_CPU, KEY, ROOT, Target, TargetFailed, h2load, keep_to_client_cpu, worker

SOURCES = Path(__file__).parent / "witnesses"
CACHE = Path.home() / ".cache" / "definition-server-witnesses"
THROUGHPUT, P95 = 0.15, 0.20
"""The allowed difference between our figure and the witness's, as a share of the witness's."""
ANSWER = 1500
RATED = 8750.0
ATTEMPTS = 4
_BUSY = 0.9
_MESSAGE_HEAD = 5
_SHAPES = (("native", 8, 32), ("native", 8, 1), ("grpcio", 8, 32))
KNOWN = "the known time"
"""The name that replaces a witness's: the time for which the server holds each call."""
_ADDED = 2.0
"""A witness may add this many times as much to a latency as to a known latency, because the witness's P95 varies
between runs."""
_CALLS_EACH = 32
"""Calls that ghz may have in flight on each connection: more than become due while the server holds one."""
Run = dict[str, Any]


class WitnessMissing(Exception):
    """The program is not installed; the text says how to get it."""


class Unmeasured(TargetFailed):
    """Our own run is invalid for a reason outside the server: another attempt may succeed."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity that was measured by our generator and by a witness."""

    witness: str
    what: str
    unit: str
    ours: float
    theirs: float
    allowed: float
    reason: str = ""
    """The reason why `ours` and `theirs` differ by more than is allowed; empty if they do not differ so much, or if no
    reason is known.
    """

    @property
    def difference(self) -> float:
        """(Ours − theirs) ÷ theirs."""
        return self.ours / self.theirs - 1

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the allowed one."""
        return abs(self.difference) <= self.allowed

    @property
    def verdict(self) -> str:
        """``agrees``, ``explained`` or ``disagrees``."""
        return "agrees" if self.agrees else "explained" if self.reason else "disagrees"


# -- ghz -----------------------------------------------------------------------------------------------------------


def build() -> Path:
    """The path of ghz, which is built unless it has been built already.

    Raises:
        WitnessMissing: if Go is not installed.
        BuildFailed: if Go cannot build it.
    """
    go = shutil.which("go")
    if go is None:
        raise WitnessMissing("building ghz needs Go 1.26 or newer, which is not installed")
    command = [go, "build", "-p", "1", "-buildvcs=false"]
    return built(SOURCES, CACHE, lambda out: make([*command, "-o", f"{out}/", "tool"], SOURCES)) / "ghz"


def ghz_program() -> Path:
    """The built ghz.

    Raises:
        WitnessMissing: if ghz is not built.
    """
    program = place(SOURCES, CACHE) / "ghz"
    if not program.exists():
        raise WitnessMissing("ghz is not built: run `python -m perf witness build`")
    return program


def ghz(program: Path, target: Target, *, rate: float, connections: int, seconds: float) -> Run:
    """Make calls at ``rate`` by ghz, all of which must be answered with OK; latencies in ms.

    Raises:
        TargetFailed: if an answer is not OK, or the report of ghz cannot be read.
    """
    command = [
        str(program), "--insecure", "--proto", str(ROOT / "service/definition_server/proto/avap.proto"), "-O", "json",
        "--call", "avap.DefinitionEngine/GetCommand", "-d", json.dumps({"name": name_of(0)}),
        "-m", json.dumps({"x-avap-auth": KEY}), "-r", f"{rate:.0f}", "-n", f"{rate * seconds:.0f}",
        "-c", f"{connections * _CALLS_EACH}", "--connections", str(connections), f"127.0.0.1:{target.port}",
    ]  # fmt: skip
    used = _children_cpu_seconds()
    try:
        done = subprocess.run(
            on_cpu(CLIENT_CPU, command), capture_output=True, text=True, timeout=60 + 3 * seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise TargetFailed("ghz did not end") from None
    run = parsed_ghz(done.stdout, done.stderr)
    return run | {"client_us_per_call": (_children_cpu_seconds() - used) / run["answered"] * 1e6}


def _children_cpu_seconds() -> float:
    """The CPU seconds of the children that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parsed_ghz(text: str, errors: str = "") -> Run:
    """The figures in the JSON that ghz printed: ``rate``, ``answered`` and ``latency`` in ms.

    Raises:
        TargetFailed: if an answer was not OK, or the text is not a report of ghz.
    """
    try:
        report = json.loads(text)
        statuses, rate = report["statusCodeDistribution"], float(report["rps"])
        latency = {f"p{each['percentage']}": each["latency"] / 1e6 for each in report["latencyDistribution"]}
        count = int(report["count"])
    except (ValueError, KeyError, TypeError) as error:
        raise TargetFailed(f"ghz: {type(error).__name__}: {error}: {(errors or text)[-300:]}") from None
    if statuses != {"OK": count} or not count:
        raise TargetFailed(f"ghz: of {count} answers {statuses.get('OK', 0)} were OK: {statuses}")
    if "p95" not in latency:
        raise TargetFailed("ghz: its report has no P95")
    return {"rate": rate, "answered": count, "latency": latency}


# -- comparing -------------------------------------------------------------------------------------------------------


def throughput(ours: Run, theirs: Run, witness: str, what: str) -> Comparison:
    """Compare rates in a closed loop. A difference is explained if the busy server took more CPU time for a call of one
    side."""
    made = Comparison(witness, what, "req/s", ours["rate"], theirs["rate"], THROUGHPUT)
    if made.agrees:
        return made
    reason = _other_batches(ours, theirs, witness) or _at_its_limit(ours)
    return Comparison(**asdict(made) | {"reason": reason})


def _other_batches(ours: Run, theirs: Run, witness: str) -> str:
    """The reason, if both kept the server busy and it took more CPU time for a call of one of them; otherwise empty."""
    costs = [run["server_cpu_seconds"] / run["answered"] * 1e6 for run in (ours, theirs)]
    busy = [run["rate"] * cost / 1e6 for run, cost in zip((ours, theirs), costs, strict=True)]
    if min(busy) < _BUSY or abs(busy[0] / busy[1] - 1) > THROUGHPUT:
        return ""
    return (
        f"calls arrived in different batches: the server was busy with both ({busy[0]:.0%} and {busy[1]:.0%}), and "
        f"took {costs[0]:.2f} µs for a call with ours, {costs[1]:.2f} µs with {witness}"
    )


def _at_its_limit(ours: Run) -> str:
    """The reason, if our generator used all of its CPU and the server did not; otherwise empty."""
    client, server = (ours[key] / ours["seconds"] for key in ("client_cpu_seconds", "server_cpu_seconds"))
    if client < _BUSY or server >= _BUSY:
        return ""
    return (
        f"our generator, which checks every octet, was at its limit ({client:.0%} of its core) and the server was not "
        f"({server:.0%}): the generator limited the rate; only the rate per second of the server's CPU time is valid"
    )


def by_h2load(catalogue: Catalogue, seconds: float) -> Iterator[Comparison]:
    """Throughput of both transports, compared with h2load."""
    for transport, connections, streams in _SHAPES:
        what = f"{transport}, {connections} connections × {streams} calls"
        with worker(transport, catalogue.descriptor, catalogue.built) as served:
            scenario = Scenario(
                name="witness", title=what, why="compare", kind="closed", connections=connections, streams=streams,
                names="one", answer_octets=ANSWER, seconds=seconds,
            )  # fmt: skip
            theirs, before = _h2load(served.target, scenario), served.answered
            ours = _valid(generate(served.target, scenario, catalogue))
            # Different batches explain different rates, so our count is also compared with the server's own count.
            if ours["answered"] > (there := served.answered - before):
                raise TargetFailed(f"our generator counted {ours['answered']} answers, the server only {there}")
            yield throughput(ours, theirs, "h2load", what)


def _h2load(target: Target, scenario: Scenario) -> Run:
    """One run of about ``scenario.seconds``; a short run before it determines the number of calls."""
    with tempfile.TemporaryDirectory(prefix="definition-server-perf-") as folder:
        request = Path(folder) / "request"
        request.write_bytes(wire.message(wire.command_request(name_of(0).encode())))
        run: Run = {"rate": 0.0}
        for seconds in (0.0, 0.3, scenario.seconds):
            count = max(4 * scenario.connections * scenario.streams, int(run["rate"] * seconds))
            run = h2load(
                target, wire.GET_COMMAND.decode(), count, scenario.connections, scenario.streams,
                octets=scenario.answer_octets + _MESSAGE_HEAD, request=request,
            )  # fmt: skip
    return run


def by_ghz(catalogue: Catalogue, seconds: float) -> Iterator[Comparison]:
    """Compare the P95 of two servers whose P95 is known, and the P95 of our server at the rated load, which ghz
    measures too.

    Raises:
        WitnessMissing: if ghz is not built.
    """
    program = ghz_program()
    with delayed(catalogue) as target:
        yield latency(*_p95s(program, target, catalogue, 300.0, seconds), "known delays, 300 calls a second")
    holding = (sys.executable, "-m", "perf.harness.slowed", "held")
    with worker("native", catalogue.descriptor, catalogue.built, program=holding) as served:
        ours, theirs = _p95s(program, served.target, catalogue, RATED, seconds)
    yield known(ours, HELD_SECONDS * 1000, f"held calls, {RATED:,.0f} calls a second")
    extra = added(ours, theirs, HELD_SECONDS * 1000)
    with worker("native", catalogue.descriptor, catalogue.built) as served:
        both = _p95s(program, served.target, catalogue, RATED, seconds)
    yield latency(*both, f"native, {RATED:,.0f} calls a second", added_ms=extra)


def _p95s(program: Path, target: Target, catalogue: Catalogue, rate: float, seconds: float) -> tuple[Run, Run]:
    """A run of our generator and one of ghz."""
    scenario = Scenario(
        name="witness", title="P95", why="compare", kind="open", connections=8, rate=rate, names="one",
        answer_octets=ANSWER, seconds=seconds,
    )  # fmt: skip
    ours = _valid(generate(target, scenario, catalogue))
    return ours, ghz(program, target, rate=rate, connections=8, seconds=seconds)


def known(ours: Run, known_ms: float, what: str) -> Comparison:
    """Compare our P95, in ms, with the time for which the server holds every call."""
    return Comparison(KNOWN, what, "ms (P95)", ours["latency"]["p95"], known_ms, P95)


def added(ours: Run, theirs: Run, known_ms: float) -> float:
    """The ms that the witness adds to the P95 of a server that holds every call for ``known_ms``. The time that our
    generator shows beyond ``known_ms`` is the server's own and is subtracted. If our generator shows less, it may be
    wrong, and nothing is subtracted."""
    shown: float = theirs["latency"]["p95"]
    ours_ms: float = ours["latency"]["p95"]
    return max(0.0, shown - max(known_ms, ours_ms))


def latency(ours: Run, theirs: Run, what: str, *, added_ms: float = 0.0) -> Comparison:
    """Compare the P95 in ms. A difference is explained if ghz adds as much to a known latency: ``added_ms``."""
    made = Comparison("ghz", what, "ms (P95)", ours["latency"]["p95"], theirs["latency"]["p95"], P95)
    if made.agrees or not 0 < made.theirs - made.ours <= _ADDED * added_ms:
        return made
    busy = theirs["client_us_per_call"] * theirs["rate"] / 1e6
    reason = (
        f"ghz measures itself: it shows {made.theirs - made.ours:.2f} ms more than ours, and adds {added_ms:.2f} ms to "
        f"calls that take a known time, at the same rate, at which it keeps its CPU {busy:.0%} busy"
    )
    return Comparison(**asdict(made) | {"reason": reason})


def _valid(run: Run) -> Run:
    if not run["valid"]:
        failure = TargetFailed if run["fault"] == "server" else Unmeasured
        raise failure(f"our own run is not valid: {run['reason']}")
    return run


def settled(compare: Callable[[], Iterator[Comparison]]) -> list[Comparison]:
    """The comparisons of the first attempt in which none disagrees; otherwise those of the last attempt.

    The machine may be shared, so its speed may change between two measurements. An instrument that measures wrongly
    disagrees in every attempt.

    Raises:
        Unmeasured: if no attempt gave a figure.
        TargetFailed: if a server or a witness fails.
    """
    found: list[Comparison] = []
    failure: Unmeasured | None = None
    for _ in range(ATTEMPTS):
        try:
            found = list(compare())
        except Unmeasured as error:
            failure = error
            continue
        if all(each.verdict != "disagrees" for each in found):
            return found
    if not found and failure is not None:
        raise failure
    return found


def witnesses(seconds: float = 2.0) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The ``witnesses`` of a record, and the ``skipped`` comparisons with their reasons."""
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    parts = {"h2load": by_h2load, "ghz": by_ghz}
    catalogue = Catalogue(1000, ANSWER)
    try:
        for name, part in parts.items():
            try:
                found += [_entry(each) for each in settled(partial(part, catalogue, seconds))]
            except (WitnessMissing, TargetFailed, OSError) as error:
                skipped.append({"what": f"witness {name}", "why": str(error)})
    finally:
        catalogue.close()
    return found, skipped


def _entry(each: Comparison) -> dict[str, Any]:
    return asdict(each) | {"difference": each.difference, "verdict": each.verdict}


def main(arguments: Sequence[str] | None = None) -> int:
    """Build ghz, or compare."""
    parser = argparse.ArgumentParser(
        prog="python -m perf witness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("build", "compare"), default="compare")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long one measurement takes")
    parser.add_argument("--keep", action="store_true", help="store a record, for the report")
    given = parser.parse_args(arguments)
    if given.what == "build":
        try:
            print(build())
        except (WitnessMissing, BuildFailed) as error:
            print(f"ghz is not built: {error}", file=sys.stderr)
            return 1
        return 0
    try:
        machine.need_cpus()
    except machine.TooFewCpus as error:
        print(error, file=sys.stderr)
        return 1
    began, facts = time.monotonic(), machine.facts()
    keep_to_client_cpu()
    found, skipped = witnesses(given.seconds)
    if given.keep:
        print(f"stored in {_keep(found, skipped, facts, time.monotonic() - began)}")
    _show(found, skipped)
    return int(any(each["verdict"] == "disagrees" for each in found))


def _keep(found: list[Run], skipped: list[dict[str, str]], facts: Run, seconds: float) -> Path:
    """Store a record that holds only witnesses, from which the report takes them."""
    record = {
        "schema": SCHEMA, "title": "Witnesses", "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_seconds": round(seconds, 1), "arguments": {}, "commit": machine.commit(),
        "machine": facts | machine.after(), "versions": machine.versions(), "runs": [], "gates": [], "knee": [],
        "memory": [], "selftest": None, "skipped": skipped, "witnesses": found,
    }  # fmt: skip
    return keep(record, f"{machine.label()}-witnesses")


def _show(found: Sequence[Run], skipped: Sequence[dict[str, str]]) -> None:
    table = Table("witness", "what", "ours", "theirs", "difference", "verdict")
    for each in found:
        numbers = (f"{each[key]:,.4g} {each['unit']}" for key in ("ours", "theirs"))
        table.add_row(each["witness"], each["what"], *numbers, f"{each['difference']:+.1%}", each["verdict"])
    Console().print(table)
    for each in found:
        if each["reason"]:
            print(f"{each['what']}: {each['reason']}")
    for line in skipped:
        print(f"skipped: {line['what']}: {line['why']}")
