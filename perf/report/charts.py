"""Charts of a record, as figures for Plotly. One chart may have several views, of which the page shows one at a time.

A server has the same colour in all charts; the page sets the colours of text and grid in its light and dark scheme. An
invalid run has no bar and no point on a curve: its reason is shown instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import isfinite
from typing import Any

import plotly.graph_objects as go

from perf.harness.statistics import Interval
from perf.report.record import Cell, KneePoint, MemoryPoint, Record, in_order
from perf.report.text import number

COLOURS = {
    "native": "#2f6fed", "compiled": "#1741a6", "grpcio": "#8b5cf6", "grpc-js": "#e08a1e", "grpc-go": "#12a3a3",
    "tonic": "#d6456b", "grpcio-aio": "#8593a3", "grpcio-sync": "#b3a48c", "nghttpd": "#4f9d4a", "nginx": "#2d6b2a",
}  # fmt: skip
OTHER_COLOUR = "#98a2b3"
BAD = "#d92d20"
_PERCENTILE_TICKS = {1: "0 %", 2: "50 %", 10: "90 %", 20: "95 %", 100: "99 %", 1000: "99.9 %", 10_000: "99.99 %",
                     100_000: "99.999 %"}  # fmt: skip
PERCENTILES = tuple(round(100 * (1 - 10 ** -(step / 12)), 9) for step in range(61))
"""From 0 to 99.999, with equal distances on the axis of the chart."""
_PARTS = (
    ("user", "server_user_seconds", "#2f6fed"),
    ("system", "server_system_seconds", "#e08a1e"),
    ("softirq", "server_softirq_seconds", "#d6456b"),
)


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of the page."""

    id: str
    alt: str
    """A description in words, for readers who cannot see the chart."""
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name → figure, as Plotly takes it. The first is shown first."""


def colour(server: str) -> str:
    """The colour of a server, the same in every chart."""
    return COLOURS.get(server, OTHER_COLOUR)


def all_charts(record: Record, history: Sequence[Record]) -> dict[str, Chart]:
    """Id → chart, without empty charts.

    Raises:
        RecordError: if a histogram of the record cannot be read.
    """
    charts = (
        per_core(record), percentiles(record), knee(record), cost(record), harness(record),
        memory(record), over_time(history),
    )  # fmt: skip
    return {chart.id: chart for chart in charts if chart.views}


def per_core(record: Record) -> Chart:
    """Answers per second of server CPU: a bar for each server."""
    chart = Chart("per-core", "Bars: answers for each second of a server's CPU time, by server.")
    for scenario in record.measured_scenarios:
        cells = _cells(record, scenario)
        rates = {server: cell.per_core for server, cell in cells.items()}
        if not any(rates.values()):
            continue
        figure = _bars(list(cells), "answers per second of server CPU")
        there = {server: interval for server, interval in rates.items() if interval is not None}
        for server, interval in there.items():
            figure.add_bar(
                y=[escape(server)], x=[interval.median], orientation="h", marker_color=colour(server),
                error_x=_error_bar(interval),
                hovertemplate=f"%{{y}}: %{{x:,.0f}} a second<br>{_spread(interval)}<extra></extra>",
            )  # fmt: skip
        figure.add_scatter(
            x=[interval.high if isfinite(interval.high) else interval.median for interval in there.values()],
            y=[escape(server) for server in there], text=[f" {number(each.median)}" for each in there.values()],
            mode="text", textposition="middle right", hoverinfo="skip", cliponaxis=False,
        )  # fmt: skip
        _reasons(figure, cells)
        longest = max(interval.median for interval in rates.values() if interval)
        figure.update_xaxes(range=[0, longest * 1.16])
        figure.update_layout(showlegend=False)
        chart.views[_view(record, scenario)] = _plain(figure)
    return chart


def percentiles(record: Record) -> Chart:
    """Latency by percentile, on a logarithmic axis that shows the slowest calls in detail."""
    chart = Chart("percentiles", "Curves: latency in milliseconds by percentile of calls, a curve for each server.")
    # Open loops are first, because they show the clients' latency; a closed loop at its limit mostly shows its own
    # length.
    for scenario in sorted(record.measured_scenarios, key=lambda name: not _scheduled(record, name)):
        curves = {server: cell.curve(PERCENTILES) for server, cell in _cells(record, scenario).items()}
        if not any(curves.values()):
            continue
        figure = _figure(height=430)
        for server, curve in curves.items():
            if curve:
                figure.add_scatter(
                    x=[1 / (1 - percentile / 100) for percentile, _ in curve], y=[ms for _, ms in curve],
                    customdata=[f"{percentile:.6g} %" for percentile, _ in curve], name=escape(server), mode="lines",
                    line={"color": colour(server), "width": 3.5 if server == "native" else 2},
                    hovertemplate="%{y:.3g} ms",
                )  # fmt: skip
        _limits(figure, record, scenario)
        figure.update_xaxes(
            type="log", title="percentile of calls", tickvals=list(_PERCENTILE_TICKS),
            ticktext=list(_PERCENTILE_TICKS.values()), unifiedhovertitle={"text": "%{customdata}"},
        )  # fmt: skip
        figure.update_yaxes(type="log", title="latency, ms", dtick="D2")
        figure.update_layout(hovermode="x unified")
        chart.views[_view(record, scenario)] = _plain(figure)
    return chart


def _limits(figure: go.Figure, record: Record, scenario: str) -> None:
    """Mark the gates' limits for the P95 in the chart of the curves."""
    found = [gate for gate in record.gates if gate.scenario == scenario and gate.unit == "ms" and "P95" in gate.gate]
    for gate in found:
        if gate.limit is not None:
            figure.add_scatter(
                x=[20], y=[gate.limit], mode="markers+text", text=[f"  limit {number(gate.limit)} ms"],
                textposition="middle right", marker={"symbol": "line-ew-open", "size": 26, "color": BAD,
                "line": {"width": 3}}, name=f"P95 limit: {number(gate.limit)} ms", hoverinfo="skip", showlegend=False,
                textfont={"color": BAD},
            )  # fmt: skip


def knee(record: Record) -> Chart:
    """Latency and answered rate by offered rate: a view for each server."""
    chart = Chart("knee", "Two charts over the offered load: latency percentiles, and the rate that was answered.")
    for server in in_order(point.server for point in record.knee):
        points = sorted((each for each in record.knee if each.server == server), key=lambda each: each.offered_rate)
        good = [point for point in points if point.valid]
        figure = _figure(height=520)
        for name, dash, width in (("p50", "dot", 2), ("p95", "solid", 3.5), ("p99", "dash", 2)):
            _knee_line(figure, good, name, {"color": colour(server), "dash": dash, "width": width})
        figure.add_scatter(
            x=[point.offered_rate for point in good], y=[point.rate for point in good], name="answered", xaxis="x",
            yaxis="y2", mode="lines+markers", line={"color": colour(server), "width": 3},
            hovertemplate="%{y:,.0f} a second answered", showlegend=False,
        )  # fmt: skip
        top = [0.0, max(point.offered_rate for point in points)]
        figure.add_scatter(
            x=top, y=top, yaxis="y2", mode="lines", line={"dash": "dot", "width": 1.5, "color": OTHER_COLOUR},
            name="as offered", hoverinfo="skip",
        )  # fmt: skip
        bad = [point for point in points if not point.valid]
        if bad:
            figure.add_scatter(
                x=[point.offered_rate for point in bad], y=[0] * len(bad), yaxis="y2", mode="markers", name="invalid",
                cliponaxis=False,
                marker={"symbol": "x-thin-open", "size": 12, "color": BAD, "line": {"width": 3}},
                hovertemplate="%{text}", text=[escape(f"invalid: {point.reason}") for point in bad],
            )  # fmt: skip
        figure.update_layout(
            hovermode="x unified",
            yaxis={"domain": [0.42, 1], "type": "log", "title": "latency, ms", "dtick": "D2"},
            yaxis2={"domain": [0, 0.32], "title": "answered / s", "rangemode": "tozero", "anchor": "x"},
            xaxis={"anchor": "y2", "title": "calls offered per second", "rangemode": "tozero"},
        )
        chart.views[server] = _plain(figure)
    return chart


def _knee_line(figure: go.Figure, points: Sequence[KneePoint], name: str, line: dict[str, Any]) -> None:
    figure.add_scatter(
        x=[point.offered_rate for point in points], y=[getattr(point, name) for point in points], name=name.upper(),
        mode="lines+markers", line=line, hovertemplate=f"{name.upper()} %{{y:.3g}} ms<extra></extra>",
    )  # fmt: skip


def cost(record: Record) -> Chart:
    """CPU time of a server for an answer: its own code, the kernel on its behalf, and the network's interrupts."""
    chart = Chart("cost", "Stacked bars: microseconds of CPU time for each answer, split into user, system, softirq.")
    for scenario in record.measured_scenarios:
        cells = _cells(record, scenario)
        split = {name: {server: cell.us_per_answer(key) for server, cell in cells.items()} for name, key, _ in _PARTS}
        if not any(value is not None for part in split.values() for value in part.values()):
            continue
        figure = _bars(list(cells), "µs of CPU time for each answer")
        for name, _, shade in _PARTS:
            there = {server: value for server, value in split[name].items() if value is not None}
            if there:
                figure.add_bar(
                    y=[escape(server) for server in there], x=list(there.values()), name=name, orientation="h",
                    marker_color=shade, hovertemplate=f"{name} %{{x:.3g}} µs<extra>%{{y}}</extra>",
                )  # fmt: skip
        _reasons(figure, cells)
        figure.update_layout(barmode="stack")
        chart.views[_view(record, scenario)] = _plain(figure)
    return chart


def harness(record: Record) -> Chart:
    """CPU time of the generator for each call, next to that of the server."""
    chart = Chart("harness", "Bars: microseconds of CPU time for each call, of the generator and of the server.")
    for server in record.servers:
        sides: dict[str, tuple[float, float]] = {}
        for scenario in record.measured_scenarios:
            cell = record.cells.get((scenario, server))
            if cell is None:
                continue
            ours, theirs = cell.figure("client_us_per_call"), cell.us_per_answer("server_cpu_seconds")
            if ours is not None and theirs is not None:
                sides[scenario] = (theirs, ours)
        if not sides:
            continue
        figure = _bars(list(sides), "µs of CPU time for each call", height=150 + 44 * len(sides))
        # The last trace is drawn on top.
        for place, name, shade in ((1, "generator", OTHER_COLOUR), (0, server, colour(server))):
            figure.add_bar(
                y=[escape(scenario) for scenario in sides], x=[pair[place] for pair in sides.values()],
                name=escape(name), orientation="h", marker_color=shade,
                hovertemplate=f"{escape(name)} %{{x:.3g}} µs<extra>%{{y}}</extra>",
            )  # fmt: skip
        # A catalogue of 200 MB costs 10,000 times as much as one answer: a linear axis would hide all other bars.
        costs = [value for pair in sides.values() for value in pair if value > 0]
        figure.update_xaxes(type="log" if costs and max(costs) > 100 * min(costs) else "linear")
        figure.update_layout(barmode="group")
        chart.views[server] = _plain(figure)
    return chart


def memory(record: Record) -> Chart:
    """Memory that a pod is charged for, by size of the catalogue and by number of workers."""
    chart = Chart("memory", "Stacked bars: memory in MB of snapshot, workers and master.")
    for workers in sorted({point.workers for point in record.memory}):
        points = sorted((each for each in record.memory if each.workers == workers), key=lambda each: each.definitions)
        labels = [f"{point.definitions:,}" for point in points]
        view = f"{workers} worker{'s' * (workers != 1)}, by definitions"
        chart.views[view] = _memory_view(points, labels, "definitions")
    for definitions in sorted({point.definitions for point in record.memory}, reverse=True):
        points = sorted((e for e in record.memory if e.definitions == definitions), key=lambda each: each.workers)
        chart.views[f"{definitions:,} definitions, by workers"] = _memory_view(
            points, [str(point.workers) for point in points], "workers"
        )
    return chart


def _memory_view(points: Sequence[MemoryPoint], labels: list[str], axis: str) -> dict[str, Any]:
    figure = _figure(height=400)
    labels = [f"{label}<br><b>{number(point.total_mb)} MB</b>" for label, point in zip(labels, points, strict=True)]
    parts = (
        ("snapshot, shared by all", [point.shared_mb for point in points], "#2f6fed"),
        ("workers", [point.workers * point.private_mb_per_worker for point in points], "#12a3a3"),
        ("master", [point.master_mb for point in points], "#e08a1e"),
    )
    for name, values, shade in parts:
        figure.add_bar(x=labels, y=values, name=name, marker_color=shade, hovertemplate=f"{name}: %{{y:,.1f}} MB",
                       width=0.5)  # fmt: skip
    if any(point.peak_mb is not None for point in points):
        figure.add_scatter(
            x=labels, y=[point.peak_mb for point in points], mode="markers", name="peak while publishing",
            marker={"symbol": "diamond-open", "size": 11, "color": BAD, "line": {"width": 2}},
            hovertemplate="peak while publishing: %{y:,.1f} MB",
        )  # fmt: skip
    figure.update_layout(barmode="stack", hovermode="x unified")
    figure.update_xaxes(type="category", title=axis)
    figure.update_yaxes(title="MB", rangemode="tozero")
    return _plain(figure)


def over_time(records: Sequence[Record]) -> Chart:
    """Stored results: a line for each server and machine, since figures of two machines are not comparable."""
    chart = Chart("history", "Lines: stored results over the time of their measurement, by server.")
    scenarios = list(dict.fromkeys(scenario for record in reversed(records) for scenario in record.measured_scenarios))
    symbols = ("circle", "square", "diamond", "cross", "star")
    machines = list(dict.fromkeys(record.machine_name for record in records))
    for scenario in scenarios:
        figure = _figure(height=400)
        for place, machine in enumerate(machines):
            mine = [record for record in records if record.machine_name == machine]
            for server in in_order(server for record in mine for server in record.servers):
                found = [(each, cell.per_core) for each in mine if (cell := each.cells.get((scenario, server)))]
                points = [(record, interval) for record, interval in found if interval is not None]
                if points:
                    figure.add_scatter(
                        x=[record.measured for record, _ in points], y=[interval.median for _, interval in points],
                        name=escape(server), legendgroup=escape(server), mode="lines+markers",
                        showlegend=not any(trace.name == escape(server) for trace in figure.data),
                        line={"color": colour(server), "width": 3 if server == "native" else 1.8},
                        marker={"size": 9, "symbol": symbols[place % len(symbols)]},
                        text=[escape(f"{record.path.name}, {record.commit or 'no commit'}") for record, _ in points],
                        hovertemplate="%{y:,.0f} a second of CPU<br>%{text}<br>" + escape(machine),
                    )  # fmt: skip
        if not figure.data:
            continue
        # One server at a time, because changes of a slow server would not be visible next to a server that is fifty
        # times as fast.
        if any(trace.name == "native" for trace in figure.data):
            figure.for_each_trace(lambda trace: trace.update(visible=True if trace.name == "native" else "legendonly"))
        figure.update_xaxes(type="date", title="measured")
        figure.update_yaxes(title="answers / s of server CPU", rangemode="tozero")
        chart.views[_view(records[-1], scenario)] = _plain(figure)
    return chart


def _cells(record: Record, scenario: str) -> dict[str, Cell]:
    return {server: record.cells[scenario, server] for server in record.servers if (scenario, server) in record.cells}


def _scheduled(record: Record, scenario: str) -> bool:
    return any(cell.kind in ("open", "publish") for cell in _cells(record, scenario).values())


def _view(record: Record, scenario: str) -> str:
    title = record.title_of(scenario)
    return f"{scenario}: {title}" if title else scenario


def _spread(interval: Interval) -> str:
    if not isfinite(interval.low):
        return "too few runs for an interval"
    return f"95 %: {number(interval.low)} – {number(interval.high)}"


def _error_bar(interval: Interval) -> dict[str, Any]:
    if not isfinite(interval.low):
        return {"visible": False}
    return {
        "type": "data", "symmetric": False, "array": [interval.high - interval.median],
        "arrayminus": [interval.median - interval.low], "thickness": 1.5, "width": 5, "color": OTHER_COLOUR,
    }  # fmt: skip


def _reasons(figure: go.Figure, cells: Mapping[str, Cell]) -> None:
    """Show the reason in place of each missing bar."""
    for server, cell in cells.items():
        if cell.reason:
            reason = cell.reason if len(cell.reason) <= 90 else cell.reason[:89] + "…"
            figure.add_annotation(
                x=0, y=escape(server), xref="paper", xanchor="left", showarrow=False,
                text=f" invalid: {escape(reason)}", font={"color": BAD},
            )  # fmt: skip


def _bars(labels: Iterable[str], axis: str, height: int = 0) -> go.Figure:
    """An empty figure for horizontal bars, with the first of ``labels`` on top."""
    order = [escape(label) for label in labels]
    figure = _figure(height=height or 110 + 40 * len(order))
    figure.update_xaxes(title=axis)
    figure.update_yaxes(
        type="category",
        showgrid=False,
        categoryorder="array",
        categoryarray=order[::-1],
        range=[-0.6, len(order) - 0.4],
    )
    return figure


def _figure(height: int) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template=go.layout.Template(), height=height, margin={"l": 12, "r": 24, "t": 40, "b": 12}, bargap=0.28,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )  # fmt: skip
    figure.update_xaxes(automargin=True, zeroline=False, ticks="")
    figure.update_yaxes(automargin=True, zeroline=False, ticks="", ticklabelstandoff=8)
    return figure


def _plain(figure: go.Figure) -> dict[str, Any]:
    plain: dict[str, Any] = figure.to_plotly_json()
    return plain
