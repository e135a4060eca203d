"""Text of others as it may be shown: nothing invisible in it, nothing that a terminal or a browser would act on."""

from __future__ import annotations


def visible(text: str, *, keep: str = "") -> str:
    """``text`` with every character that is not printable, except those in ``keep``, as its escape.

    Names and code come from a table that the server does not own. An escape sequence in them must not reach the
    terminal, and a character that turns the direction of writing must not reach a page.
    """
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )
