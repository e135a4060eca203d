"""docs/troubleshooting.md quotes messages as the source has them, and gives each a cause and a remedy."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
FOREIGN = {
    "password authentication failed": "PostgreSQL's",
    "wrong magic number": "the AVAP language server's",
}
"""Messages of other programs that the page explains."""
LEAST = 4
"""The least number of letters of a part of a message that is searched for."""


@cache
def texts() -> list[str]:
    """Every string of the source; in f-strings, … stands for inserted values."""
    found = []
    for path in sorted((ROOT / "service").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
    return found


def rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in found if row[0] != "message"]


MESSAGES = sorted({message for row in rows() for message in re.findall("`([^`]+)`", row[0].partition(" (")[0])})


def in_source(message: str) -> bool:
    """Whether one text of the source has all fixed parts of ``message``, in this order."""
    parts = [part.strip() for part in message.split("…") if len(part.strip()) >= LEAST]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return bool(parts) and any(pattern.search(text) for text in texts())


@pytest.mark.parametrize("number", range(len(MESSAGES)))
def test_every_message_of_the_page_is_in_the_source(number: int) -> None:
    message = MESSAGES[number]
    assert message in FOREIGN or in_source(message), message


def test_a_message_that_is_not_in_the_source_is_reported() -> None:
    assert not in_source("Definitions were eaten by …")
    assert in_source("Definitions Broadcasted")


def test_every_message_has_a_cause_and_a_remedy() -> None:
    assert len(rows()) > 40
    assert [row for row in rows() if len(row) != 3 or not all(row)] == []
