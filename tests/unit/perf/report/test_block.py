"""Blocks of Markdown pages that commands write."""

from __future__ import annotations

import pytest
from perf.report.block import replaced

BEGIN, END = "<!-- x -->\n", "<!-- /x -->\n"


@pytest.mark.parametrize("after", ["", "after\n", "after"])
@pytest.mark.parametrize("old", ["", "old\n", "two\nlines\n"])
def test_writing_a_block_leaves_the_rest_of_the_page_unchanged(old: str, after: str) -> None:
    assert replaced(f"before\n{BEGIN}{old}{END}{after}", "x", "new\n") == f"before\n{BEGIN}new\n{END}{after}"


def test_a_block_at_the_end_of_a_page_needs_no_newline_after_it() -> None:
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
def test_a_page_without_exactly_one_block_is_refused_with_the_names_of_its_marks(page: str) -> None:
    with pytest.raises(ValueError, match="needs the line <!-- x --> and after it the line <!-- /x -->, each once"):
        replaced(page, "x", "new\n")
