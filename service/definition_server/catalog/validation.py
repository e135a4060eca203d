"""The findings about the rows: which rows are not served, which are suspect, and why.

The server does not own the table: any row may be invalid. A row that the wire format cannot carry is not served. The
gate (`gate`) judges rows that clients would refuse. A row that only looks wrong is served, and counted as suspect.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from definition_server.catalog.definition import Row, Unserved, shown

LARGE_DEFINITION = 4 * 1024 * 1024
"""Octets that a gRPC client accepts by default. A larger answer reaches only clients that have raised their limit."""

HOLDABLE = frozenset(Unserved) - {Unserved.NULL_NAME, Unserved.EMPTY_NAME, Unserved.DUPLICATE}
"""The reasons for which a command may be held: its row has a name, and no other row of that name is served."""

_EXAMPLES = 10


class Suspect(StrEnum):
    """The reasons for which a served row is suspect."""

    INTERFACE_NOT_JSON_ARRAY = "interface_not_json_array"
    LARGER_THAN_4_MIB = "larger_than_4_mib"
    NAME_TOO_LONG = "name_too_long"
    """No client can request it: the name does not fit into a request."""
    CODE_INVALID_HERE = "code_invalid_here"
    """The code does not compile with the server's Python. It is served because a large part of the catalogue does not
    compile either.
    """


@dataclass(slots=True)
class Findings:
    """The findings about the rows of one snapshot."""

    source_rows: int = 0
    unserved: Counter[Unserved] = field(default_factory=Counter)
    suspect: Counter[Suspect] = field(default_factory=Counter)
    held: Counter[Unserved] = field(default_factory=Counter)
    """Commands that are served in their last good version, by the reason why their row is not served."""
    unchecked: int = 0
    """Rows that are served although their content is not judged yet."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason → up to ten rows, as ``id=7 name='if'``."""

    def note(self, reason: Unserved | Suspect, row: Row) -> None:
        """Count ``row`` under ``reason``."""
        if isinstance(reason, Unserved):
            self.unserved[reason] += 1
        else:
            self.suspect[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(_example(row))

    def withdraw(self, reason: Unserved | Suspect, row: Row) -> None:
        """Undo `note` for ``row``, because another row, or an earlier version, is served in its place."""
        if isinstance(reason, Unserved):
            self.unserved[reason] -= 1
            if not self.unserved[reason]:
                del self.unserved[reason]
        else:
            self.suspect[reason] -= 1
            if not self.suspect[reason]:
                del self.suspect[reason]
        example = _example(row)
        if example in self.examples[reason]:
            self.examples[reason].remove(example)
        if not self.examples[reason]:
            del self.examples[reason]


def _example(row: Row) -> str:
    name = None if row.name is None else shown(row.name)
    return f"id={row.id} name={name!r}"


def reason_not_served(row: Row) -> Unserved | None:
    """Why ``row`` cannot be served; None if it can. Duplicates are not detected here, but by the builder."""
    _, name, kind, interface, code, _, _, fault, _ = row
    if not name:
        return Unserved.NULL_NAME if name is None else Unserved.EMPTY_NAME
    if fault is not None:
        return fault
    if code is None:
        return Unserved.NULL_CODE
    try:
        for text in (code, name, kind, interface):
            if text and not text.isascii():
                text.decode()
    except UnicodeDecodeError:
        return Unserved.INVALID_ENCODING
    return None
