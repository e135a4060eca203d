"""The figures of a measurement with their promised limits. They are stored as JSON, and the table is rendered from the
JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from tests.support import machine
from tests.support.results import keep


@dataclass
class Row:
    """One figure. ``least`` and ``most`` are promises; a row without either is shown for information only."""

    name: str
    unit: str
    value: float | None = None
    least: float | None = None
    most: float | None = None
    error: str = ""
    detail: Any = None

    @property
    def kept(self) -> bool | None:
        """Whether the promise is kept; None if the row has no promise. A missing figure does not keep a promise."""
        if self.least is None and self.most is None:
            return None if not self.error else False
        if self.value is None:
            return False
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    @property
    def verdict(self) -> str:
        """The promise in words."""
        if self.error:
            return f"**no figure**: {self.error}"
        return {None: "", True: "kept", False: "**missed**"}[self.kept]


@dataclass
class Figures:
    """The figures of one measurement, each with its promise, and the machine on which they were measured."""

    title: str
    arguments: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    measured: str = ""
    duration_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self.measured = datetime.now(UTC).isoformat(timespec="seconds")
        self.versions = machine.versions()
        self.machine = machine.facts()

    def add(self, row: Row) -> Row:
        """Add ``row`` and print it."""
        self.rows.append(row)
        shown = "–" if row.value is None else _number(row.value)
        print(f"{time.monotonic() - self._began:6.1f} s  {row.name}: {shown} {row.unit}  {row.verdict}", flush=True)
        return row

    def note(self, name: str, value: float, unit: str, most: float | None = None) -> Row:
        """Add a value that is known; ``most`` is its upper limit."""
        return self.add(Row(name, unit, round(value, 3), most=most))

    def measure(self, row: Row, how: Callable[[], tuple[float, Any]], *failures: type[Exception]) -> Row:
        """Fill in ``row`` with the value and the details that ``how`` returns. An exception of ``failures`` becomes the
        row's error."""
        try:
            row.value, row.detail = how()
        except failures as error:
            row.error = " ".join(str(error).split())[:300] or type(error).__name__
        return self.add(row)

    def value(self, name: str) -> float | None:
        """The value of the row called ``name``; None if there is none."""
        return next((row.value for row in self.rows if row.name == name), None)

    @property
    def kept(self) -> bool:
        """Whether every promise is kept and no figure is missing."""
        return all(row.kept is not False for row in self.rows)

    def finish(self) -> None:
        """Record the facts that are known only at the end."""
        self.duration_seconds = round(time.monotonic() - self._began, 1)
        self.machine |= machine.after()

    def close(self, name: str) -> int:
        """Finish, print and store the record. Returns the exit code of the command: 1 if a promise is not kept."""
        self.finish()
        self.show()
        print(f"stored in {self.save(name)}")
        return 0 if self.kept else 1

    def save(self, name: str) -> Path:
        """Write ``perf/results/<date>-<name>.json``."""
        return keep(asdict(self) | {"rows": [asdict(row) | {"kept": row.kept} for row in self.rows]}, name)

    def show(self) -> None:
        """Print the table."""
        table, console = markdown(self.rows), Console()
        if console.is_terminal:
            console.print(Markdown(table))
        else:
            print(table)


def markdown(rows: Sequence[Row]) -> str:
    """The table, for a README."""
    lines = ["| figure | measured | promised | verdict |", "|---|---|---|---|"]
    for row in rows:
        value = "–" if row.value is None else f"{_number(row.value)} {row.unit}"
        promise = f"≥ {_number(row.least)}" if row.least is not None else ""
        promise += f"≤ {_number(row.most)}" if row.most is not None else ""
        lines.append(f"| {row.name} | {value} | {promise} | {row.verdict} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
