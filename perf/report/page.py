"""The HTML page of a record: one file that needs no network, because it contains the code and data of its charts."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from perf.report import text
from perf.report.charts import Chart, all_charts
from perf.report.record import Gate, Record

TEMPLATE = "page.html.j2"
BULLET_WIDTH = 190
"""Width of the small drawing next to a gate, in the units of the drawing."""
_KNOWN_VERDICTS = ("kept", "missed", "invalid")
_HEADLINE = "get-hot"
_RATED = "rated"
_KNEE_FACTOR = 0.97
"""Minimum share of the offered calls that a server below its knee answers."""


def page(record: Record, history: Sequence[Record] = ()) -> str:
    """The page of ``record``; ``history``: stored records for the chart over time, with or without this one.

    Raises:
        RecordError: if a histogram of the record cannot be read.
    """
    record = with_others(record, history)
    past = sorted({each.path.resolve(): each for each in (*history, record)}.values(), key=lambda each: each.measured)
    past = [
        each
        for each in past
        if each.runs and (each.valid or each.path == record.path) and not each.arguments.get("against")
    ]
    charts = all_charts(record, past)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = text.number
    models = list(dict.fromkeys(gate.noise_model for gate in record.gates if gate.noise_model))
    gates = [_gate(gate, models) for gate in record.gates]
    invalid = _invalid(record)
    values: dict[str, Any] = {
        "record": record, "charts": {name: charts.get(name) for name in _CHARTS}, "gates": gates, "models": models,
        "invalid": invalid,
        "tiles": _tiles(record), "verdict": _verdict(record), "headings": _headings(record),
        "machine_line": text.machine_line(record), "machine": _machine(record), "history_count": len(past),
        "rates": _grid(record, record.measured_scenarios, ""),
        "latencies": _grid(record, text.scheduled(record), "p95"),
        "contents": _contents(record, charts, bool(invalid)), "figures_json": figures_json(charts),
        "plotly_packed": base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
    }  # fmt: skip
    return environment.get_template(TEMPLATE).render(values)


def with_others(record: Record, others: Sequence[Record]) -> Record:
    """``record``, supplemented from ``others``: self-test, memory and witnesses take long and are measured separately,
    so each missing part is taken from the newest record of the same machine that has it."""
    there = sorted(
        (each for each in others if each.machine_name == record.machine_name), key=lambda each: each.measured
    )
    missing = {}
    for name in ("selftest", "memory", "witnesses"):
        found = [value for each in there if (value := getattr(each, name))]
        if not getattr(record, name) and found:
            missing[name] = found[-1]
    return record.model_copy(update=missing)


_CHARTS = {
    "per-core": "Per core", "percentiles": "Latency", "knee": "Knee", "cost": "Cost", "harness": "Harness",
    "memory": "Memory", "history": "History",
}  # fmt: skip


def figures_json(charts: dict[str, Chart]) -> Markup:
    """The data of the charts for a script element, escaped so that no text of a record can end the element."""
    plain = json.dumps({name: list(chart.views.values()) for name, chart in charts.items()}, ensure_ascii=False)
    return Markup(plain.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _contents(record: Record, charts: dict[str, Chart], invalid: bool) -> list[tuple[str, str]]:
    """(id, name) of the sections of the page."""
    found = [("gates", "Gates")] if record.gates else []
    found += [(name, title) for name, title in _CHARTS.items() if name in charts]
    found += [("selftest", "Self-test")] if record.selftest else []
    found += [("witnesses", "Witnesses")] if record.witnesses else []
    found += [("invalid", "Invalid")] if invalid or record.skipped else []
    return [*found, ("machine", "Machine")]


def _verdict(record: Record) -> dict[str, str]:
    """One sentence on all gates, and its colour."""
    if not record.gates:
        return {"kind": "none", "text": "No gate was judged."}
    counts = {name: sum(gate.verdict == name for gate in record.gates) for name in _KNOWN_VERDICTS}
    total = len(record.gates)
    if counts["kept"] == total:
        return {"kind": "kept", "text": f"All {total} gates are kept." if total > 1 else "The gate is kept."}
    kind = "missed" if counts["missed"] else "invalid"
    missed = [gate.gate for gate in record.gates if gate.verdict != "kept"]
    others = f"{counts['missed']} missed, {total - counts['kept'] - counts['missed']} invalid"
    return {"kind": kind, "text": f"{counts['kept']} of {total} gates are kept, {others}: {'; '.join(missed)}."}


def _tiles(record: Record) -> list[dict[str, str]]:
    """The most important figures."""
    found = []
    hot, rated = record.cells.get((_HEADLINE, "native")), record.cells.get((_RATED, "native"))
    if hot and hot.per_core:
        found.append((text.number(hot.per_core.median), "answers per second of server CPU, native"))
        if (times := record.times(_HEADLINE, "grpc-js")) is not None:
            found.append((f"{text.number(times)} ×", "the rate of grpc-js"))
    if rated and (slow := rated.latency("p95")) is not None:
        judged = [gate for gate in record.gates if gate.scenario == _RATED and gate.gate.startswith("P95")]
        offered = f"P95 at {text.number(rated.figure('offered_rate'))} calls a second on one core"
        found.append((f"{text.number(slow)} ms", judged[0].gate if judged else offered))
    if hot and (ours := hot.figure("client_us_per_call")) is not None:
        found.append((f"{text.number(ours)} µs", "CPU time of the generator for each call, in no server's figure"))
    return [{"value": value, "what": what} for value, what in found]


def _headings(record: Record) -> dict[str, str]:
    """The headings of the charts: a sentence with the main figure, or a plain name if there is no figure."""
    headings = {
        "per-core": "Answers per core",
        "percentiles": "Latency",
        "knee": "Latency against load",
        "memory": "Memory",
    }
    others = (server for scenario, server in record.cells if scenario == _HEADLINE and server != "native")
    times = {name: found for name in others if (found := record.times(_HEADLINE, name)) is not None}
    if times:
        name = "grpc-js" if "grpc-js" in times else max(times, key=lambda each: times[each])
        headings["per-core"] = f"A core answers {text.number(times[name])} times as many calls as one of {name}"
    rated = record.cells.get((_RATED, "native"))
    if rated and rated.latency("p95") is not None and rated.latency("p99") is not None:
        fast, slow = text.number(rated.latency("p95")), text.number(rated.latency("p99"))
        headings["percentiles"] = f"At the rated load, 95 of 100 calls take {fast} ms or less, and 99 take {slow} ms"
    good = [point for point in record.knee if point.server == "native" and point.valid]
    kept = [point for point in good if (point.rate or 0) >= _KNEE_FACTOR * point.offered_rate]
    if kept and len(kept) < len(good):
        highest = text.number(max(point.offered_rate for point in kept))
        headings["knee"] = f"One core keeps up with {highest} calls a second"
    if record.memory:
        largest = max(record.memory, key=lambda point: (point.definitions, point.workers))
        workers = f"{largest.workers} worker{'s' * (largest.workers != 1)}"
        headings["memory"] = f"{largest.definitions:,} definitions and {workers}: {text.number(largest.total_mb)} MB"
    return headings


def _grid(record: Record, scenarios: Sequence[str], percentile: str) -> list[dict[str, Any]]:
    """Rows of a table scenario × server; without a ``percentile``, of answers per core."""
    return [
        {"scenario": name, "title": record.title_of(name),
         "cells": [_cell(record, name, server, percentile) for server in record.servers]}
        for name in scenarios
    ]  # fmt: skip


def _cell(record: Record, scenario: str, server: str, percentile: str) -> dict[str, str]:
    cell = record.cells.get((scenario, server))
    if cell is None:
        return {"text": text.NOTHING, "reason": ""}
    if percentile:
        return {"text": text.number(cell.latency(percentile)), "reason": cell.reason}
    return {"text": text.number(cell.per_core.median if cell.per_core else None), "reason": cell.reason}


def _invalid(record: Record) -> list[dict[str, Any]]:
    """Every cell that has an invalid run, even if it also has valid ones."""
    return [
        {"scenario": scenario, "server": server, "count": len(cell.invalid), "of": len(cell.runs),
         "reason": "; ".join(dict.fromkeys(run.reason or "no reason was given" for run in cell.invalid))}
        for (scenario, server), cell in record.cells.items() if cell.invalid
    ]  # fmt: skip


def _gate(gate: Gate, models: Sequence[str]) -> dict[str, Any]:
    kind = gate.verdict if gate.verdict in _KNOWN_VERDICTS else "invalid"
    return {"it": gate, "kind": kind, "value": text.number(gate.value), "interval": text.interval(gate),
            "bound": text.bound(gate), "bullet": bullet(gate),
            "model": models.index(gate.noise_model) + 1 if gate.noise_model in models else 0}  # fmt: skip


def bullet(gate: Gate) -> dict[str, Any] | None:
    """Positions in the drawing next to a gate, from 0 to `BULLET_WIDTH`; None if the gate has no value."""
    if gate.value is None or gate.limit is None:
        return None
    samples = [sample for sample in gate.samples if sample is not None]
    there = [gate.value, gate.limit, *samples, *(each for each in (gate.low, gate.high) if each is not None)]
    least, most = min(there), max(there)
    margin = (most - least or abs(most) or 1.0) * 0.08
    least, most = least - margin, most + margin

    def place(value: float) -> float:
        return round((value - least) / (most - least) * BULLET_WIDTH, 1)

    limit = place(gate.limit)
    known = gate.low is not None and gate.high is not None
    return {
        "value": place(gate.value), "limit": limit, "samples": [place(sample) for sample in samples],
        "low": place(gate.low) if known and gate.low is not None else None,
        "high": place(gate.high) if known and gate.high is not None else None,
        "fine_from": limit if gate.bound == "least" else 0,
        "fine_width": round(BULLET_WIDTH - limit, 1) if gate.bound == "least" else limit,
    }  # fmt: skip


def _machine(record: Record) -> list[tuple[str, str]]:
    """Facts about the machine in readable form: names without underscores, lists with spaces."""
    shown = []
    for name, value in (record.machine | {"commit": record.commit or "unknown", "measured": record.measured}).items():
        value_text = ", ".join(f"{each:.2f}" if isinstance(each, float) else str(each) for each in value) if isinstance(
            value, list | tuple) else f"{value:,}" if isinstance(value, int) else str(value)  # fmt: skip
        shown.append((name.replace("_", " "), value_text))
    return [*shown, ("arguments", ", ".join(f"{name}={value}" for name, value in record.arguments.items()) or "none")]
