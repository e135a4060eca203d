"""The commands of a documentation page, as readers copy them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and its first line."""

    language: str
    text: str
    line: int


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of that language, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], dedent(found["text"]), text.count("\n", 0, found.start()) + 1)
        for found in _BLOCK.finditer(text)
        if found["language"] == language
    ]


def languages(page: Path) -> set[str]:
    """The languages of the blocks of a page."""
    return {found["language"] for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))}


def broken_links(page: Path) -> list[str]:
    """Relative links whose file or heading does not exist."""
    broken = []
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    return broken


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
