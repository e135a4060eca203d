"""The table of a record of attacks: one row for each variant and attack, with a verdict."""

from __future__ import annotations

from perf.benches.attack_list import load
from perf.benches.attack_table import listed, table
from perf.benches.attacks import unit
from perf.benches.figures import Row

PLAN = load()


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


def test_where_limits_are_not_judged_the_row_gives_the_reason() -> None:
    (row,) = cells(table(PLAN, rows("grpcio, cleartext", "gzip-bombs", steady_p99_ms=50)))
    assert row[8].startswith("not judged: C-core")


def test_the_list_names_every_attack_with_its_limits() -> None:
    told = listed(PLAN)
    for attack in PLAN.attacks:
        assert f"{attack.name}: {attack.title}" in told
    assert "connect_p99_ms <= 10, or 5 x undisturbed" in told
