"""Decides which rows are served, and gives the reason for each that is not.

The server does not own the table: any row may be invalid. A row that the wire format cannot carry is left out and
counted by reason. A row that it can carry, but that looks wrong, is served as it is and counted as suspect, because
holding back one odd definition breaks every script that uses it, while serving it breaks nothing that worked before.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from definition_server.catalog.definition import Row, Unserved

LARGE_DEFINITION = 4 * 1024 * 1024
"""Octets that a gRPC client accepts by default. A larger answer reaches only clients that have raised their limit."""

_EXAMPLES = 10


class Suspect(StrEnum):
    """The reasons for which a served row is suspect."""

    INTERFACE_NOT_JSON_ARRAY = "interface_not_json_array"
    LARGER_THAN_4_MIB = "larger_than_4_mib"


@dataclass(slots=True)
class Findings:
    """The findings in the rows of one snapshot."""

    source_rows: int = 0
    unserved: Counter[Unserved] = field(default_factory=Counter)
    suspect: Counter[Suspect] = field(default_factory=Counter)
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
        """Undo `note` for ``row``: another row, or an earlier version, is served in its place."""
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
    name = None if row.name is None else row.name.decode(errors="replace")
    return f"id={row.id} name={name!r}"


def reason_not_served(row: Row) -> Unserved | None:
    """Why ``row`` by itself cannot be served; None if it can. The builder detects duplicates."""
    _, name, kind, interface, code, _, _, fault = row
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


def _refuse(constant: str) -> None:
    """Reject NaN and Infinity: Python's parser reads them, but they are not JSON (RFC 8259)."""
    raise ValueError(constant)


class InterfaceCheck:
    """Tells whether an interface is a JSON array. Results are cached, because many commands have the same interface."""

    _MOST_CACHED = 10_000

    def __init__(self) -> None:
        self._cache: dict[bytes, bool] = {}

    def is_json_array(self, interface: bytes) -> bool:
        """Whether ``interface`` parses as a JSON array."""
        known = self._cache.get(interface)
        if known is None:
            try:
                known = isinstance(json.loads(interface.decode(), parse_constant=_refuse), list)
            except (ValueError, RecursionError):
                known = False
            if len(self._cache) < self._MOST_CACHED:
                self._cache[interface] = known
        return known
