"""Prints the answers of a control socket: as JSON, or in tables and lines; and the progress while a command waits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC
from typing import Any

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from definition_server.cli.exits import on_terminal, print_wrapped_facts, visible
from definition_server.rpc import avap_control_pb2 as pb

_SHOWN_HASH = 16
"""Digits of a hash in tables; every command accepts 8 digits or more."""
_BRIEF_HASH = 8
"""Digits of a hash in a narrow line: the fewest that a command accepts."""
_NARROW_CELL = 18
"""The fewest columns to which a name is folded."""
_WHOLE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z|[0-9a-f]{8,16}|[0-9.]{7,15}:[0-9]+")
"""The pattern of a cell that is never broken into lines."""

# -- values ----------------------------------------------------------------------------------------------------------


def json_value(message: Message) -> dict[str, Any]:
    """``message`` as a value for JSON. Times are ISO 8601; 64-bit integers are numbers."""
    value = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _with_numbers(value, message.DESCRIPTOR)


def _with_numbers(value: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    """MessageToDict writes 64-bit integers as text, for JavaScript. This function makes them numbers, because all of
    them are counts."""
    for name, field in descriptor.fields_by_name.items():
        if name not in value:
            continue
        entry = value[name]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value[name] = {key: int(number) for key, number in entry.items()}
        elif field.message_type is not None and not isinstance(entry, str):
            children = entry if isinstance(entry, list) else [entry]
            for child in children:
                _with_numbers(child, field.message_type)
        elif field.cpp_type == field.CPPTYPE_INT64:
            value[name] = int(entry)
    return value


def iso(stamp: Timestamp) -> str:
    """ISO 8601 in UTC, in whole seconds; a dash if there is no time."""
    if not stamp.seconds:
        return "-"
    return stamp.ToDatetime(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def age(stamp: Timestamp, now: float) -> str:
    """The time from ``stamp`` to ``now`` (seconds since the epoch), in the largest unit that it has at least twice."""
    seconds = max(0.0, now - stamp.ToNanoseconds() / 1e9)
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def short(version_hash: str) -> str:
    """The beginning of a hash, for a table."""
    return version_hash[:_SHOWN_HASH]


def brief(version_hash: str) -> str:
    """The beginning of a hash, for a narrow line."""
    return version_hash[:_BRIEF_HASH]


def yes_or_no(yes: bool, reason: str) -> str:
    """``yes`` as the word "yes" or "no", with the reason if there is one."""
    word = "yes" if yes else "no"
    return f"{word}: {visible(reason)}" if reason else word


# -- tables ----------------------------------------------------------------------------------------------------------


def print_table(title: str | None, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table at a terminal, or lines with tabs in a pipe, the names of the columns first. Print nothing if
    there are no rows.

    On a terminal that is too narrow for the table, each row is a group of lines, one per column, so that nothing is cut
    off.
    """
    if not rows:
        return
    cells = [[visible(cell) for cell in row] for row in rows]
    if not on_terminal():
        if title is not None:
            click.echo(f"\n{title}:")
        for row in [list(columns), *cells]:
            click.echo("\t".join(row))
        return
    console = Console()
    if _least_columns(columns, cells) > console.width:
        _print_records(console, title, columns, cells)
        return
    table = Table(box=None, title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        # Names may be long, so their columns are folded. Columns of times or hashes are not.
        whole = any(_WHOLE.fullmatch(row[number]) for row in cells) or _short_words(column, cells, number)
        table.add_column(column, no_wrap=whole, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    if title is not None:
        console.print()
    console.print(table)


def _short_words(column: str, cells: list[list[str]], number: int) -> bool:
    return all(len(text) <= _NARROW_CELL and " " not in text for text in (column, *(row[number] for row in cells)))


def _least_columns(columns: tuple[str, ...], cells: list[list[str]]) -> int:
    """The width of the narrowest terminal on which words stay whole and the beginning of a long name has room."""
    words = [
        max(len(word) for text in (name, *(row[number] for row in cells)) for word in (text.split() or [""]))
        for number, name in enumerate(columns)
    ]
    whole = [any(_WHOLE.fullmatch(row[number]) for row in cells) for number in range(len(columns))]
    return sum((width if fixed else min(width, _NARROW_CELL)) + 2 for width, fixed in zip(words, whole, strict=True))


def _print_records(console: Console, title: str | None, columns: tuple[str, ...], cells: list[list[str]]) -> None:
    if title is not None:
        console.print(f"\n[bold]{title}[/bold]")
    for number, row in enumerate(cells):
        if number:
            console.print()
        print_wrapped_facts([(name or "served", cell) for name, cell in zip(columns, row, strict=True) if cell])


def print_versions(title: str | None, versions: Iterable[pb.Version]) -> None:
    """Print a table of the history's versions. In a pipe, the hashes are not shortened."""
    hash_of = short if on_terminal() else str
    rows: list[tuple[str, ...]] = [
        (
            "*" if each.served else "",
            hash_of(each.version_hash),
            iso(each.published_at),
            f"{each.definitions:,}",
            _changes(each),
        )
        for each in versions
    ]
    print_table(title, ("", "version", "published", "definitions", "changes"), rows)


def _changes(version: pb.Version) -> str:
    if not version.HasField("changes"):
        return ""
    return f"+{version.changes.added:,} -{version.changes.removed:,} ~{version.changes.changed:,}"
