"""The sample catalogue, for demonstrations and tests: AVAP commands in the form of a deployment's table.

The commands are in ``sample_catalogue.toml`` next to this module; its first comment lists the names that their bodies
may use. No body is executed here.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

COLUMNS = ("name", "interface", "description", "type", "logic", "componenttype", "service", "command", "code")
"""The table's columns except ``id``, in the order of the table, of ``SampleCommand``'s fields and of ``as_csv``."""

NULL = r"\N"
"""The form of None in the output of ``as_csv``. Unlike a text, it has no quotes."""

_REFUSED = re.compile(r"\0|^\\\.\r?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SampleCommand:
    """One row of ``obex_dapl_functions``; None is NULL. ``interface`` is JSON text, as in the table."""

    name: str
    interface: str | None = None
    description: str | None = None
    type: str | None = None
    logic: bool | None = None
    componenttype: str | None = None
    service: str | None = None
    command: str | None = None
    code: str | None = None


class _Null:
    """The form of None for the csv module, which with QUOTE_NONNUMERIC writes no quotes around an object that has a
    ``__float__``."""

    def __str__(self) -> str:
        return NULL

    def __float__(self) -> float:
        return float("nan")


def load_sample_catalogue() -> tuple[SampleCommand, ...]:
    """Every sample command, in the order of the file. Names are unique."""
    text = resources.files(__package__).joinpath("sample_catalogue.toml").read_text(encoding="utf-8")
    return tuple(_command(table) for table in tomllib.loads(text)["command"])


def as_csv(commands: Iterable[SampleCommand]) -> str:
    r"""The rows as CSV without a heading, one field for each of ``COLUMNS``, for psql's standard input after

    ``\copy obex_dapl_functions (<COLUMNS>) FROM pstdin WITH (FORMAT csv, NULL '\N')``

    PostgreSQL reads the marker as NULL only without quotes, and every text here has quotes. So a text ``\N``, or an
    empty one, is stored as that text.

    Raises:
        ValueError: a text holds NUL, which PostgreSQL cannot store, or a line ``\.``, at which psql before
            version 18 ends the data even between quotes.
    """
    lines = io.StringIO()
    writer = csv.writer(lines, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    for command in commands:
        values = [getattr(command, column) for column in COLUMNS]
        for column, value in zip(COLUMNS, values, strict=True):
            if isinstance(value, str) and _REFUSED.search(value):
                raise ValueError(f"{column} of {command.name!r} holds NUL or a line \\.: psql cannot copy it")
        writer.writerow([_Null() if value is None else value for value in values])
    return lines.getvalue()


def _command(table: dict[str, Any]) -> SampleCommand:
    interface = table.pop("interface", None)
    rendered = None if interface is None else json.dumps(interface, ensure_ascii=False, separators=(",", ":"))
    return SampleCommand(interface=rendered, **table)
