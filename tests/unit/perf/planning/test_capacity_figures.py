"""Figures for `definition-server capacity` come only from valid runs of the definition server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from perf.planning import capacity_figures
from perf.planning.capacity_figures import RecordUnusable, figures, main
from perf.targets.target import ROOT

from definition_server.cli.sizing import figures_from


def run(scenario: str, rate: float, server: str = "native", valid: bool = True) -> dict[str, Any]:
    return {"scenario": scenario, "server": server, "valid": valid, "per_server_cpu_second": rate}


def point(definitions: int, megabytes: int) -> dict[str, Any]:
    return {
        "definitions": definitions, "workers": 2, "snapshot_octets": megabytes << 20, "private_mb_per_worker": 30.0,
        "shared_mb": 1.0, "resident_mb": 100.0 + megabytes, "peak_mb": 100.0 + 3 * megabytes,
        "publication_cpu_seconds": 0.1, "kb_per_connection": 4.5,
    }  # fmt: skip


def step(offered: float, p95: float | None, valid: bool = True) -> dict[str, Any]:
    return {"offered_rate": offered, "rate": offered * 0.99, "p95": p95, "valid": valid}


RECORD: dict[str, Any] = {
    "measured": "2026-11-25T00:00:00+00:00",
    "machine": {"cpu": "a CPU", "kernel": "6.1"},
    "runs": [
        run("rated", 50_000), run("rated", 54_000), run("rated", 90_000), run("deadlines", 140_000),
        run("rated", 5, "grpcio"), run("get-zipf", 7, valid=False), run("get-hot", 900_000),
    ],
    "knee": [step(60_000, 1.0), step(20_000, 0.2), step(90_000, 80.0), step(95_000, 0.1)],
    "memory": [point(1000, 2), point(100_000, 200)],
}  # fmt: skip


def test_a_figure_is_the_median_of_the_valid_runs_of_our_server() -> None:
    assert figures(RECORD, "r.json")["per_core"] == {"rated": 54_000, "deadlines": 140_000}


def test_the_knee_is_the_last_step_before_the_first_that_was_too_slow() -> None:
    assert figures(RECORD, "r.json")["knee"]["rate"] == 59_400
    broken = RECORD | {"knee": [step(20_000, None, valid=False), step(30_000, 0.1)]}
    assert figures(broken, "r.json")["knee"] is None
    assert figures(RECORD | {"knee": []}, "r.json")["knee"] is None


def test_the_capacity_command_reads_the_written_figures() -> None:
    read = figures_from(json.loads(json.dumps(figures(RECORD, "r.json"))))
    assert read.machine == "a CPU, Linux 6.1"
    assert [each.snapshot_mb for each in read.points] == [2, 200]


def test_memory_may_come_from_another_file() -> None:
    without = {key: value for key, value in RECORD.items() if key != "memory"}
    assert figures(without, "r.json", RECORD["memory"]) == figures(RECORD, "r.json")
    with pytest.raises(RecordUnusable, match=r"r\.json holds no memory .*perf memory"):
        figures(without, "r.json")


def test_a_record_without_a_valid_run_is_refused() -> None:
    invalid = RECORD | {"runs": [run("rated", 50_000, valid=False)]}
    with pytest.raises(RecordUnusable, match="no valid run of native"):
        figures(invalid, "r.json")


def test_the_file_is_written_and_found_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, output = tmp_path / "r.json", tmp_path / "figures.json"
    record.write_text(json.dumps(RECORD), encoding="utf-8")
    monkeypatch.setattr(capacity_figures, "OUTPUT", output)
    assert main([str(record), "--check"]) == 1
    assert main([str(record)]) == 0
    assert main([str(record), "--check"]) == 0
    record.write_text(json.dumps(RECORD | {"measured": "later"}), encoding="utf-8")
    assert main([str(record), "--check"]) == 1
    assert "is stale" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"memory": [{}, {}]}', '{"machine": 1}'])
def test_a_file_that_is_not_a_record_is_refused_in_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "r.json"
    record.write_text(content, encoding="utf-8")
    assert main([str(record)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("no figures: ")
    assert told.count("\n") == 1


def test_the_package_plans_with_the_record_that_the_readme_shows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"\[record\]\((perf/results/\S+?)\)", readme)
    assert main([str(ROOT / shown), "--check"]) == 0, f"run `python -m perf capacity {shown}`"
