"""Formats figures, and renders the tables of a record in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor, log10
from pathlib import Path

from perf.generator.scenarios import COMPILED
from perf.report.block import marks, replaced
from perf.report.record import Cell, Gate, Record, RecordError

ALL = "perf table"
"""The block of all tables, in docs/performance.md."""
BRIEF = "perf summary"
"""The block of three table rows, in the README."""
_BRIEF = ("get-hot", "one-by-one", "rated")
_BRIEF_SERVERS = ("native", "compiled", "grpcio", "grpc-js", "grpc-go", "tonic")
SCHEDULED = ("open", "publish", "slow-reader")
CERTIFIED = ("upstream-stress",)
"""Closed loops whose latency is shown nevertheless, because another server was certified with this load."""
NOTHING = "–"
_P95_HEAD = f"P95 in ms, from the instant a call was due ({', '.join(CERTIFIED)}, a closed loop: from sending):"


def number(value: float | None) -> str:
    """Three significant figures, the precision of a measurement: 546,000 · 27.5 · 0.312."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    # Rounded before the digits are counted: 9.996 becomes 10.0, which has one digit fewer after the point.
    rounded = round(value, 2 - floor(log10(abs(value))))
    return f"{rounded:,.{max(0, 2 - floor(log10(abs(rounded))))}f}"


def bound(gate: Gate) -> str:
    """The limit as written in ``sla.toml``, with its direction."""
    sign = "≥" if gate.bound == "least" else "≤"
    return f"{sign} {NOTHING if gate.limit is None else f'{gate.limit:,.10g}'}"


def interval(gate: Gate) -> str:
    """The confidence interval of the median; empty if it is not known."""
    return "" if gate.low is None or gate.high is None else f"{number(gate.low)} – {number(gate.high)}"


def machine_line(record: Record) -> str:
    """Date and machine in one line."""
    facts = record.machine
    parts = [
        str(facts.get("cpu", "unknown CPU")),
        f"{facts.get('cpus', '?')} CPUs",
        f"Linux {facts.get('kernel', '?')}",
    ]
    if facts.get("python"):
        build = facts.get("python_build")
        parts.append(f"Python {facts['python']}" + (f" ({build})" if build else ""))
    return f"{record.measured[:10]}, {', '.join(parts)}"


def rates(record: Record) -> str:
    """Scenario × server: answers per second of server CPU."""
    wanted = [name for name in record.measured_scenarios if any(cell.per_core for cell in _row(record, name).values())]
    return _grid(record, wanted, lambda cell: number(cell.per_core.median) if cell.per_core else NOTHING)


def latencies(record: Record) -> str:
    """Scenario × server: P95 in milliseconds, for open loops."""
    return _grid(record, scheduled(record), lambda cell: number(cell.latency("p95")))


def kernel_shares(record: Record) -> str:
    """Scenario × server: the kernel's share of the server's CPU time, which only fewer or other system calls lower."""
    wanted = [name for name in record.measured_scenarios
              if any(cell.kernel_share is not None for cell in _row(record, name).values())]  # fmt: skip
    return _grid(record, wanted, lambda cell: NOTHING if cell.kernel_share is None else f"{cell.kernel_share:.0%}")


def scheduled(record: Record) -> list[str]:
    """Scenarios whose latency is that of real clients."""
    return [
        name
        for name in record.measured_scenarios
        if name in CERTIFIED
        or any(cell.kind in SCHEDULED and not cell.in_steps for cell in _row(record, name).values())
    ]


def generator_cost(record: Record) -> str:
    """The CPU time of the harness itself, which is not in the server's figures."""
    rows = []
    for (scenario, server), cell in record.cells.items():
        ours, theirs = cell.figure("client_us_per_call"), cell.us_per_answer("server_cpu_seconds")
        if ours is not None and theirs is not None:
            rows.append([scenario, server, f"{number(theirs)} µs", f"{number(ours)} µs"])
    return _table(["scenario", "server", "server, for each answer", "generator, for each call"], rows)


def gates(record: Record) -> str:
    """All verdicts."""
    rows = []
    for gate in record.gates:
        verdict = gate.verdict if gate.verdict == "kept" else f"**{gate.verdict}**: {gate.reason}"
        rows.append([gate.gate, number(gate.value), interval(gate), bound(gate), gate.unit, verdict])
    return _table(["gate", "median", "95 %", "limit", "unit", "verdict"], rows)


def selftest(record: Record) -> str:
    """How often the harness raised an alarm, and how often it should have raised one."""
    rows = []
    for case in record.selftest.cases if record.selftest else []:
        wanted = ("≥ " if case.alarm_expected else "≤ ") + str(case.limit if case.limit is not None else NOTHING)
        marks = "".join("●" if alarm else "○" for alarm in case.alarms)
        verdict = "kept" if case.kept else "**missed**"
        rows.append([case.name, case.what, f"{sum(case.alarms)} of {len(case.alarms)}", wanted, marks, verdict])
    return _table(["case", "slowdown", "alarms", "required", "run by run", "verdict"], rows)


def knee(record: Record) -> str:
    """The knee, in numbers."""
    rows = [
        [point.server, number(point.offered_rate), number(point.rate), number(point.p50), number(point.p95),
         number(point.p99), "" if point.valid else f"**invalid**: {point.reason}"]
        for point in record.knee
    ]  # fmt: skip
    return _table(["server", "offered / s", "answered / s", "P50 ms", "P95 ms", "P99 ms", ""], rows)


def memory(record: Record) -> str:
    """Memory that a pod is charged for."""
    rows = [
        [f"{point.definitions:,}", str(point.workers), number(point.shared_mb), number(point.private_mb_per_worker),
         number(point.master_mb), number(point.total_mb), number(point.peak_mb)]
        for point in record.memory
    ]  # fmt: skip
    head = ["definitions", "workers", "snapshot MB", "each worker MB", "master MB", "total MB", "peak MB"]
    return _table(head, rows)


def readme(record: Record, link: str) -> str:
    """All tables, for docs/performance.md. ``link``: the path of the record, relative to the page."""
    count = max((len(cell.valid) for cell in record.cells.values()), default=0)
    runs = f"{count} run{'s' * (count != 1)}"
    kept = sum(gate.verdict == "kept" for gate in record.gates)
    parts = [f"Answers per second of a server's CPU time, median of up to {runs}, interleaved ([record]({link})):",
             rates(record)]  # fmt: skip
    if scheduled(record):
        parts += [_P95_HEAD, latencies(record)]
    if shares := kernel_shares(record):
        parts += [
            "The kernel's share of a server's CPU time (what is not user time: system calls, the network):",
            shares,
        ]
    parts += notes(record)
    verdicts = f" {kept} of {len(record.gates)} gates kept." if record.gates else ""
    parts.append(f"{machine_line(record)}.{verdicts}")
    return "\n\n".join(part for part in parts if part) + "\n"


def brief(record: Record, link: str) -> str:
    """Three rows for the README, and the latency for which the SLA has a limit."""
    servers = [server for server in _BRIEF_SERVERS if server in record.servers]
    rows = []
    for name in (name for name in _BRIEF if name in record.measured_scenarios):
        cells = _row(record, name)
        shown = [_shown(cells.get(server), lambda cell: number(cell.per_core.median if cell.per_core else None))
                 for server in servers]  # fmt: skip
        rows.append([f"{name}: {record.title_of(name)}" if record.title_of(name) else name, *shown])
    rated = record.cells.get(("rated", "native"))
    p95 = rated.latency("p95") if rated else None
    sentence = "" if p95 is None else f"P95 in the last row, native: {number(p95)} ms. "
    head = "Calls that one second of a server's CPU time answers; each server in its usual form on one core"
    head += f"; {COMPILED}: native with the compiled engine:" if COMPILED in servers else ":"
    last = f"{sentence}Measured {machine_line(record)}, {_commit(record)} ([record]({link})).\n"
    return "\n\n".join([head, _table(["", *servers], rows), last])


def _commit(record: Record) -> str:
    """The revision of the sources that were measured."""
    if not record.commit:
        return "commit unknown"
    changed = " with changes that were not committed" if record.commit.endswith("+") else ""
    return f"commit {record.commit.removesuffix('+')}{changed}"


def whole(record: Record) -> str:
    """All tables, each under a heading."""
    parts = [f"# {record.title}", f"{machine_line(record)}; commit {record.commit or 'unknown'}."]
    for heading, table in (
        ("Answers per second of server CPU", rates(record)), ("P95, ms", latencies(record)),
        ("The kernel's share of server CPU", kernel_shares(record)), ("Gates", gates(record)),
        ("Knee", knee(record)), ("Memory", memory(record)), ("Cost of the harness", generator_cost(record)),
        ("Self-test", selftest(record)),
    ):  # fmt: skip
        if table:
            parts += [f"## {heading}", table]
    if remarks := notes(record):
        parts += ["## Invalid and not measured", *remarks]
    return "\n\n".join(parts) + "\n"


def notes(record: Record) -> list[str]:
    """The figures that the tables lack, with the reasons."""
    invalid = [f"- {scenario} on {server}: invalid: {_cut(cell.reason)}" for (scenario, server), cell
               in record.cells.items() if cell.reason]  # fmt: skip
    skipped = [f"- {each.what}: not measured: {_cut(each.why)}" for each in record.skipped]
    return ["\n".join(invalid + skipped)] if invalid or skipped else []


def rewritten(text: str, record: Record, link: str, name: str) -> str:
    """``text`` with the tables of ``record`` between its markers; ``name``: the name of the file, for the error.

    Raises:
        RecordError: unless each marker of one of the two pairs occurs exactly once.
    """
    block, render = (BRIEF, brief) if any(mark in text for mark in marks(BRIEF)) else (ALL, readme)
    try:
        return replaced(text, block, render(record, link))
    except ValueError as error:
        raise RecordError(f"{name}: {error}") from None


def link_from(readme_path: Path, record: Path) -> str:
    """The record's path from the folder of the page, which may be ``docs``; only its name if it is elsewhere."""
    folder, up = readme_path.resolve().parent, ""
    if folder.name == "docs":
        folder, up = folder.parent, "../"
    try:
        return up + record.resolve().relative_to(folder).as_posix()
    except ValueError:
        return record.name


def _row(record: Record, scenario: str) -> Mapping[str, Cell]:
    return {server: cell for (name, server), cell in record.cells.items() if name == scenario}


def _grid(record: Record, scenarios: Sequence[str], show: Callable[[Cell], str]) -> str:
    rows = []
    for scenario in scenarios:
        cells = _row(record, scenario)
        rows.append([scenario, *(_shown(cells.get(server), show) for server in record.servers)])
    return _table(["scenario", *record.servers], rows)


def _shown(cell: Cell | None, show: Callable[[Cell], str]) -> str:
    if cell is None:
        return NOTHING
    return "**invalid**" if cell.reason else show(cell)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty if there are no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cut(each) for each in line)} |" for line in lines)


def _cut(text: str) -> str:
    """One short line, without characters that would end a cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 300 else line[:299] + "…"
