"""HTML in which everything that is not a tag of ours is escaped: text becomes HTML in one place, `text`.

`Html` marks what is HTML already. `element` takes both, and escapes what is not. So a name from a table can reach a
page as text alone, whatever it holds.
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

    ``attributes``: values are escaped; one that is None is left out; ``_`` in a name stands for ``-``, and one at its
    end is dropped (``class_``).
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = joined((content,)) if isinstance(content, str) else joined(content)
    return Html(f"<{name}{given}>{inner}</{name}>")
