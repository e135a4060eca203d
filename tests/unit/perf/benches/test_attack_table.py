"""The table of a record of attacks: one row for each variant and attack, with a verdict."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from perf.benches.attack_list import load
from perf.benches.attack_table import BEGIN, END, listed, table, write
from perf.benches.attacks import unit
from perf.benches.figures import Row
from tests.support.results import newest

PLAN = load()
PAGE = Path(__file__).parents[4] / "docs/security.md"


def rows(variant: str, name: str, *more: Row, **figures: float) -> list[Row]:
    made = [Row(f"{variant} · {name}: {figure}", unit(figure), value) for figure, value in figures.items()]
    return made + list(more)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]


def test_a_row_shows_the_victim_the_memory_and_the_special_figures() -> None:
    found = rows("native, tls", "garbage", log_lines=12, connect_p50_ms=1.234, connect_p99_ms=9, connect_max_ms=20,
                 connect_failed=3, worker_after_mb=5, master_after_mb=0, worker_peak_mb=7)  # fmt: skip
    (row,) = cells(table(PLAN, found))
    assert row[0] == "octets at random (native, tls)"
    assert row[2] == "log lines 12"
    assert row[4] == "1.23 / 9 / 20, 3 failed"
    assert row[7] == "+5 / +0 (peak +7)"
    assert row[8] == "kept"


def test_the_verdict_names_every_limit_that_is_not_kept_and_missing_figures() -> None:
    name = "native, cleartext · garbage: "
    found = rows("native, cleartext", "garbage", Row(name + "log_lines", "", 99, most=60),
                 Row(name + "peers_named", "", None, least=1))  # fmt: skip
    (row,) = cells(table(PLAN, found))
    assert row[8] == "**missed**: log_lines 99, not <= 60; peers_named missing, not >= 1"


def test_a_run_without_figures_shows_its_error() -> None:
    found = [Row("native, cleartext · garbage: measured", "", error="the victim does not start")]
    (row,) = cells(table(PLAN, found))
    assert row[8] == "**missed**: no figure: the victim does not start"


def test_a_row_gives_the_reason_if_limits_are_not_judged() -> None:
    (row,) = cells(table(PLAN, rows("grpcio, cleartext", "gzip-bombs", steady_p99_ms=50)))
    assert row[8].startswith("not judged: C-core")


def test_the_list_names_every_attack_with_its_limits() -> None:
    told = listed(PLAN)
    for attack in PLAN.attacks:
        assert f"{attack.name}: {attack.title}" in told
    assert "connect_p99_ms <= 10, or 5 x undisturbed" in told


def record(*found: Row) -> dict[str, Any]:
    machine = {"cpu": "A CPU", "cpus": 2, "python": "3.11.2", "load_before": [0.5], "load_after": [2.25]}
    return {"measured": "2026-11-30T01:02:03+00:00", "machine": machine, "rows": [asdict(row) for row in found]}


def test_the_page_has_a_row_for_each_attack_on_the_native_transport_and_names_its_source(tmp_path: Path) -> None:
    names = {"connect_p50_ms": 1.0, "connect_p99_ms": 4.0, "calm_connect_p50_ms": 0.5, "calm_connect_p99_ms": 2.0}
    found = [
        *rows("native, tls", "garbage", steady_p50_ms=0.2, steady_p99_ms=3, worker_stretch=1.5, **names),
        *rows("native, cleartext", "streams-at-shutdown", shutdown_seconds=1.25),
        *rows("grpcio, cleartext", "garbage", log_lines=1),
    ]
    file = tmp_path / "2026-11-30-attacks.json"
    file.write_text(json.dumps(record(*found)))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    assert write(PLAN, page, file, check=True) == 1
    assert "stale" in page.read_text()
    assert write(PLAN, page, file, check=False) == 0
    assert write(PLAN, page, file, check=True) == 0
    text = page.read_text()
    first, second = [line for line in text.splitlines() if line.startswith("| ") and "attack |" not in line]
    assert first == "| octets at random | TLS | 1 / 4 | 0.5 / 2 | 1.5 | 0.2 / 3 | – / – | kept |"
    assert "a stop takes 1.25 s" in second
    assert "2026-11-30, A CPU, 2 CPUs, Python 3.11.2, load average 0.5 before and 2.2 after" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_a_page_without_marks_is_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "record.json", tmp_path / "page.md"
    file.write_text(json.dumps(record()))
    page.write_text("nothing\n")
    assert write(PLAN, page, file, check=False) == 1
    assert page.read_text() == "nothing\n"
    assert BEGIN in capsys.readouterr().err


def test_the_figures_of_docs_security_are_those_of_the_newest_record() -> None:
    newest_record = newest("attacks")
    assert newest_record is not None
    again = "run `python -m perf attacks --page docs/security.md`"
    assert write(PLAN, PAGE, newest_record, check=True) == 0, again
