"""Makes untrusted text safe to show: without invisible characters, and without characters that a terminal or browser
interprets.
"""

from __future__ import annotations


def visible(text: str, *, keep: str = "") -> str:
    """``text`` with every character that is not printable, except those in ``keep``, as its escape.

    Names and code are from a table that the server does not own. An escape sequence in them must not reach the
    terminal, and a character that changes the direction of writing must not reach a page.
    """
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )
