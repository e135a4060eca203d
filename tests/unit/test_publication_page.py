"""Every promise of docs/publication.md names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/publication.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "::" in line]


def test_every_promise_names_an_existing_test() -> None:
    assert len(ROWS) > 40
    for promise, test in ROWS:
        file, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test).groups()
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), promise


def test_no_promise_and_no_test_is_named_twice() -> None:
    for column in zip(*ROWS, strict=True):
        assert len(set(column)) == len(column)
