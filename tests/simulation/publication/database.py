"""The simulated table: its states, its changes, and a source that reads it and may fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from zlib import crc32

from definition_server.catalog.definition import Row
from definition_server.control_plane.source import Ranges, SourceError

BAD = b"x = = "
"""The beginning of code that does not compile. The simulated checker detects no other bad code."""
GOOD = b"x = "
CLOCK = b"clock"
"""A row whose code is the number of the table's state, so that each catalogue shows which state it comes from."""

_BATCH = 8
_RANGES = 12

State = dict[bytes, bytes]
"""Name → code."""


class Table:
    """The rows, and all their states so far."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._number = 0
        self.states: list[State] = []
        """The states by commit; the last one is the present state."""
        self.last_commit_of: dict[bytes, int] = {}
        """The code of `CLOCK` (empty: no row) → the last commit after which the table was in that state."""
        rows: State = {b"command%02d" % number: self._code() for number in range(random.randrange(12, 40))}
        for name in list(rows)[: random.choice([0, 0, 1, 3])]:
            rows[name] = self._code(bad=True)
        self._commit(rows)

    @property
    def rows(self) -> State:
        """The present state."""
        return self.states[-1]

    def _code(self, *, bad: bool = False) -> bytes:
        return (BAD if bad else GOOD) + b"%d" % self._random.randrange(10**9)

    def _commit(self, rows: State) -> None:
        if rows:
            self._number += 1
            rows = rows | {CLOCK: GOOD + b"%d" % self._number}
        self._note(rows)

    def _note(self, rows: State) -> None:
        self.states.append(rows)
        self.last_commit_of[rows.get(CLOCK, b"")] = len(self.states) - 1

    def change(self) -> str:
        """Change the table in some way. Returns a description of the change."""
        random, rows = self._random, dict(self.rows)
        names = [name for name in rows if name != CLOCK]
        kind = random.choices(
            ["edit", "poison", "mend", "add", "remove", "mass delete", "mass poison", "grow", "empty", "return"],
            [30, 12, 12, 8, 6, 4, 3, 3, 2, 10],
        )[0]
        if kind == "return" or not names:
            self._note(random.choice(self.states[-30:]))
            return "return"
        some = random.sample(names, min(len(names), random.randrange(1, 5)))
        many = random.sample(names, random.randrange(len(names) // 3, len(names)) or 1)
        if kind == "edit":
            rows |= {name: self._code() for name in some}
        elif kind == "poison":
            rows |= {name: self._code(bad=True) for name in some}
        elif kind == "mend":
            rows = {name: self._code() if code.startswith(BAD) else code for name, code in rows.items()}
        elif kind == "add":
            rows |= {b"added%d" % random.randrange(100): self._code(bad=random.random() < 0.3) for _ in some}
        elif kind == "grow":
            rows |= {b"grown%d" % number: self._code() + b"#" * 400 for number in range(len(rows) + 4)}
        elif kind == "empty":
            rows = {}
        elif kind == "mass poison":
            rows |= {name: self._code(bad=True) for name in many}
        else:
            for name in many if kind == "mass delete" else some[:2]:
                del rows[name]
        self._commit(rows)
        return kind


@dataclass(slots=True)
class Faults:
    """The present faults."""

    refuses: bool = False
    hangs: bool = False
    breaks: bool = False
    """Whether readings end in the middle of the rows."""
    slow: bool = False


def _range(name: bytes) -> int:
    return crc32(name) % _RANGES


class SimulatedReading:
    """A reading of the table as of one moment."""

    def __init__(self, rows: State, number: int, faults: Faults, random: Random) -> None:
        self.fingerprint = str(number)
        self._rows, self._faults, self._random = list(rows.items()), faults, random

    async def ranges(self, before: Ranges | None) -> Ranges:
        """Each row's range follows from its name."""
        rows: dict[int, list[tuple[bytes, bytes]]] = {}
        for name, code in sorted(self._rows):
            rows.setdefault(_range(name), []).append((name, code))
        return Ranges("", {number: repr(found) for number, found in rows.items()})

    async def batches(self, ranges: Collection[int] | None = None) -> AsyncIterator[list[Row]]:
        """All rows, or those of ``ranges``, or a part of them and an error."""
        self._random.shuffle(self._rows)
        for start in range(0, len(self._rows), _BATCH):
            if self._faults.slow:
                await asyncio.sleep(self._random.uniform(0, 2))
            if self._faults.breaks and self._random.random() < 0.4:
                raise SourceError("simulated: the connection is lost in the midst of the rows")
            yield [
                Row(number, name, b"function", b"[]", code, range=_range(name))
                for number, (name, code) in enumerate(self._rows[start : start + _BATCH], start)
                if ranges is None or _range(name) in ranges
            ]


class SimulatedSource:
    """`DefinitionSource` on a `Table`."""

    STATEMENT_SECONDS = 30.0

    def __init__(self, table: Table, faults: Faults, random: Random) -> None:
        self._table, self._faults, self._random = table, faults, random

    @asynccontextmanager
    async def read(self) -> AsyncIterator[SimulatedReading]:
        """A reading of the state at this moment."""
        if self._faults.refuses:
            await asyncio.sleep(self._random.choice([0.0, 0.01, 2.0]))
            raise SourceError("simulated: connection refused")
        if self._faults.hangs:
            await asyncio.sleep(self.STATEMENT_SECONDS)
            raise SourceError("simulated: no answer in time")
        if self._faults.slow:
            await asyncio.sleep(self._random.uniform(0, 5))
        yield SimulatedReading(self._table.rows, len(self._table.states), self._faults, self._random)

    async def close(self) -> None:
        """No reading is open."""
