"""Blocks of pages that commands write."""

from __future__ import annotations

import pytest
from perf.report.block import replaced

BEGIN, END = "<!-- x -->\n", "<!-- /x -->\n"


@pytest.mark.parametrize("after", ["", "after\n", "after"])
@pytest.mark.parametrize("old", ["", "old\n", "two\nlines\n"])
def test_only_the_block_is_replaced(old: str, after: str) -> None:
    assert replaced(f"before\n{BEGIN}{old}{END}{after}", "x", "new\n") == f"before\n{BEGIN}new\n{END}{after}"


def test_a_block_at_the_very_end_needs_no_newline_after_it() -> None:
    assert replaced(f"{BEGIN}<!-- /x -->", "x", "new\n") == f"{BEGIN}new\n<!-- /x -->"


@pytest.mark.parametrize(
    "page",
    [
        "",
        BEGIN,
        END,
        END + BEGIN,
        BEGIN + END + BEGIN,
        BEGIN + END + END,
        BEGIN + BEGIN + END,
        "<!-- x --> <!-- /x -->\n",
    ],
    ids=["none", "begin", "end", "reversed", "two-begins", "two-ends", "nested", "inline"],
)
def test_a_page_without_exactly_one_block_is_refused_by_the_name_of_its_marks(page: str) -> None:
    with pytest.raises(ValueError, match="needs the line <!-- x --> and after it the line <!-- /x -->, each once"):
        replaced(page, "x", "new\n")
