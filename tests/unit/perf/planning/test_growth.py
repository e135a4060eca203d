"""The growth table on the page matches the newest record."""

from __future__ import annotations

from pathlib import Path

import pytest
from perf.planning import growth
from perf.planning.growth import Growth, newest_table, table_of

PAGE = Path(__file__).parents[4] / "docs" / "performance.md"
FIGURES = Growth(1000, 1.14, 0.5, 0.6, 50.0, 17.2, 2.5, 0.01, 1.02, 0.4, 3.0, failed=2)


def test_the_page_contains_the_growth_table_of_the_newest_record() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert newest_table(PAGE) == page, "run `python -m perf growth --page docs/performance.md`"


def test_the_table_has_a_column_for_each_size_and_states_the_failed_calls() -> None:
    table = table_of(
        [FIGURES, Growth(1_000_000, 1139, 21.2, 30, 1770, 17.2, 130, 3.1, 4.2, 0.4, 8, failed=1)], "r.json"
    )
    assert table.startswith("[Record](r.json); calls that failed: 3.\n")
    lines = table.splitlines()
    assert lines[2:4] == ["| definitions | 1,000 | 1,000,000 |", "|---|--:|--:|"]
    assert "| start → SERVING | 0.500 s | 21.2 s |" in lines
    assert "| slowest call beside a publication | 3.00 ms | 8.00 ms |" in lines


def test_without_a_record_the_page_is_unchanged_and_the_error_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "newest", lambda _: None)
    page = tmp_path / "page.md"
    page.write_text("<!-- growth -->\n<!-- /growth -->\n", encoding="utf-8")
    assert growth.main(["--page", str(page)]) == 1
    assert "run `python -m perf growth`" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "<!-- growth -->\n<!-- /growth -->\n"
