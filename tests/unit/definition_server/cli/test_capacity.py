"""The answer of ``capacity``: the plan satisfies its own limits, and no measured point lies above the memory model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.snapshot import Snapshot
from definition_server.cli import sizing
from definition_server.cli.main import cli
from definition_server.cli.sizing import Demand, FiguresError, MemoryModel, MemoryPoint, answer, figures_from

POINTS = [
    MemoryPoint(1, 2.0, 37.0, 90.0, 95.0, 0.06),
    MemoryPoint(4, 2.0, 29.0, 168.0, 172.0, 0.05),
    MemoryPoint(1, 20.0, 37.0, 124.0, 172.0, 0.25),
    MemoryPoint(1, 200.0, 38.0, 500.0, 990.0, 3.0),
    MemoryPoint(4, 200.0, 29.0, 590.0, 1080.0, 2.8),
]
TOLD: dict[str, Any] = {
    "source": "a.json", "measured": "2026-11-25T00:00:00+00:00", "machine": "a machine",
    "per_core": {"rated": 50_000, "deadlines": 140_000}, "knee": {"rate": 80_000},
    "memory": [{name: getattr(point, name) for name in MemoryPoint.__slots__} for point in POINTS],
    "kb_per_connection": 5.0, "remembered_answers": 8192,
}  # fmt: skip
FIGURES = figures_from(TOLD)
DEMAND = Demand(rps=35_000, definitions=100_000, definition_octets=2100, replicas=1, connections=1000, margin=0.4)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["capacity", *arguments])


def test_the_most_expensive_scenario_is_used() -> None:
    assert FIGURES.planning == ("rated", 50_000)
    assert answer(DEMAND, FIGURES).worker_rps == pytest.approx(30_000)
    assert answer(DEMAND, FIGURES).workers == 2


def test_the_planned_rate_of_a_worker_is_never_above_its_knee() -> None:
    early = figures_from(TOLD | {"knee": {"rate": 10_000}})
    assert answer(DEMAND, early).workers == 6  # 35,000 ÷ (10,000 × 0.6)
    assert answer(DEMAND, figures_from(TOLD | {"knee": None})) == answer(DEMAND, FIGURES)


@pytest.mark.parametrize(("rps", "workers"), [(1, 2), (60_000, 2), (60_001, 3), (90_000, 3), (300_000, 10)])
def test_the_number_of_workers_is_the_load_divided_by_the_planned_rate(rps: float, workers: int) -> None:
    assert answer(replace(DEMAND, rps=rps), FIGURES).workers == workers


def test_the_plan_for_several_replicas_allows_one_of_them_to_be_down() -> None:
    single = answer(DEMAND, FIGURES)
    assert answer(replace(DEMAND, replicas=2), FIGURES).rps_per_replica == single.rps_per_replica
    assert answer(replace(DEMAND, replicas=5), FIGURES).rps_per_replica == 35_000 / 4


@given(
    rps=st.floats(1, 1e7), definitions=st.integers(1, 10**6), octets=st.integers(1, 10**5),
    replicas=st.integers(1, 1000), connections=st.integers(0, 10**6), margin=st.floats(0, 0.95),
)  # fmt: skip
def test_the_margin_and_the_twenty_percent_hold_for_any_demand(
    rps: float, definitions: int, octets: int, replicas: int, connections: int, margin: float
) -> None:
    demand = Demand(rps, definitions, octets, replicas, connections, margin)
    found = answer(demand, FIGURES)
    assert found.workers * found.worker_rps >= found.rps_per_replica * (1 - 1e-6)
    assert found.utilisation <= 1 - margin + 1e-6
    assert found.busy_cores <= found.cpu_request + 1e-6
    assert found.cpu_request <= found.cpu_limit
    assert found.memory_limit_mb >= found.peak_mb * 1.2 > found.resident_mb
    more = answer(replace(demand, rps=rps * 2, definitions=definitions * 2), FIGURES)
    assert more.workers >= found.workers
    assert more.memory_limit_mb >= found.memory_limit_mb


@pytest.mark.parametrize("peak", [False, True])
def test_no_measured_point_lies_above_the_memory_model(peak: bool) -> None:
    for points in (POINTS, sizing.load_figures().points):
        model = MemoryModel.over(points, peak)
        # Each worker above the measured number may be as large as the largest measured worker.
        assert model.worker_mb == max(point.private_mb_per_worker for point in points)
        for point in points:
            measured = point.peak_mb if peak else point.resident_mb
            assert model.held_mb(point.workers, point.snapshot_mb) >= measured - 1e-6


@pytest.mark.parametrize(("count", "octets"), [(1, 1), (7, 130), (1000, 900)])
def test_the_size_of_a_snapshot_is_that_of_the_builder(count: int, octets: int) -> None:
    builder = SnapshotBuilder()
    builder.add(Row(1, b"name%04d" % number, None, None, b"x" * octets) for number in range(count))
    built = builder.build(generation=1, created_at_ns=0)
    mean = len(Snapshot(built.to_bytes()).answer(b"name0000") or b"")  # `length` is the length of each message
    # The tail of the body (total count and version hash) takes some 70 octets more.
    assert sizing.snapshot_octets(count, mean) == pytest.approx(built.size, abs=80)


def test_the_packaged_figures_can_be_used() -> None:
    shipped = sizing.load_figures()
    assert shipped.planning[1] > 1000
    assert shipped.source.endswith(".json")


BAD: dict[str, dict[str, Any]] = {
    "no scenario": {"per_core": {}},
    "a rate of nothing": {"per_core": {"rated": 0}},
    "one size of catalogue": {"memory": TOLD["memory"][:2]},
    "a memory point that lacks something": {"memory": [{"workers": 1}]},
    "a knee of nothing": {"knee": {"rate": 0}},
    "no machine": {"machine": None, "per_core": None},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_invalid_figures_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FiguresError, match=sizing.FILE):
        figures_from(TOLD | change)


def test_json_holds_the_demand_the_answer_and_the_figures() -> None:
    told = json.loads(run("--rps", "35000", "--definitions", "1000", "--replicas", "3", "--json").output)
    assert told["demand"]["replicas"] == 3
    assert told["replica"]["rps_per_replica"] == 17_500
    assert told["replica"]["memory_limit_mb"] > told["replica"]["peak_mb"] * 1.2 - 0.001
    assert told["figures"]["scenario"] in told["figures"]["per_core"]


def test_the_page_shows_the_answer_the_formulas_and_the_source() -> None:
    told = run("--rps", "35000")
    assert told.exit_code == 0
    for part in ("workers:", "memory limit:", "20 % above", "margin 40%", sizing.load_figures().source, "(WORKERS="):
        assert part in told.output
    assert "one replica down" in run("--rps", "35000", "--replicas", "4").output


WRONG = {
    "nothing": (),
    "no load": ("--rps", "0"),
    "a load that is none": ("--rps", "nan"),
    "an endless load": ("--rps", "inf"),
    "no replica": ("--rps", "1", "--replicas", "0"),
    "no definition": ("--rps", "1", "--definitions", "0"),
    "all of it margin": ("--rps", "1", "--margin", "1"),
    "a word": ("--rps", "many"),
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_an_invalid_demand_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    told = run(*arguments)
    assert told.exit_code == 2
    assert "Error: " in told.output


def test_damaged_figures_end_the_command_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "FILE", "not_there.json")
    told = run("--rps", "1")
    assert told.exit_code == 1
    assert told.output.startswith("Error: the measured figures cannot be used: not_there.json: ")
    assert told.output.count("\n") == 1
