"""A part of a page that a command writes: the lines between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations


def marks(name: str) -> tuple[str, str]:
    """The lines before and after the block."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def replaced(page: str, name: str, content: str) -> str:
    """``page`` with ``content``, which ends with a newline, as its block ``name``.

    Raises:
        ValueError: unless each mark occurs exactly once and they are in order.
    """
    begin, end = (f"{mark}\n" for mark in marks(name))
    before, found, rest = f"{page}\n".partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or any(page.count(mark) != 1 for mark in marks(name)):
        raise ValueError(f"needs the line {begin.strip()} and after it the line {end.strip()}, each once")
    return f"{before}{begin}{content}{end}{after}"[:-1]
