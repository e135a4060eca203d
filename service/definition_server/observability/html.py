"""HTML in which all text except our own tags is escaped. Only the function `text` makes HTML from text.

The type `Html` marks text that is HTML already. `element` accepts both and escapes all other text. So a name from a
table appears on a page only as text, whatever characters it contains.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

from definition_server.observability.visible import visible


class Html(str):
    """Text that is HTML. Only this module makes it, from constants and from escaped text."""

    __slots__ = ()


Content: TypeAlias = "str | Html | Iterable[str | Html]"


def text(value: str) -> Html:
    """``value`` as HTML: escaped, and with characters that are not printable as their escapes."""
    return Html(escape(visible(value)))


def joined(parts: Iterable[str | Html]) -> Html:
    """``parts`` one after another."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts))


def element(name: str, content: Content = "", /, **attributes: str | None) -> Html:
    """The element ``name`` with ``content``.

    ``attributes``: values are escaped; an attribute whose value is None is left out; ``_`` in a name stands for ``-``,
    and a ``_`` at the end of a name is dropped (``class_``).
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = joined((content,)) if isinstance(content, str) else joined(content)
    return Html(f"<{name}{given}>{inner}</{name}>")
