"""The promises that must hold after every step, with any faults. A model that does not use the server's code judges
them.

1. *Whole*: a worker serves exactly one catalogue that passed, with the content that it had when it passed.
2. *Good*: no catalogue that passes has code that clients refuse, unless no checker could judge it.
3. *Forward*: without a pin, no state of the table is served after a later one.
4. *Held*: a catalogue that loses or gains too much at once does not pass before an operator accepts it, unless it
   passed before.
5. *Fresh*: after the faults have ended, every worker serves the table's state within one cycle.
6. *Pinned*: a pin reaches every worker within a second, and so does its end.
7. *Rising*: generations only rise, in the master and in each worker.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from tests.simulation.publication.database import BAD, CLOCK, State, Table

from definition_server.catalog import wire
from definition_server.catalog.definition import parse_definition
from definition_server.catalog.signing import UNSIGNED, payload_of
from definition_server.catalog.snapshot import Snapshot

SMALL_GROWTH = 4096
"""Octets by which a catalogue may always grow, in the simulation: its rows are small."""

_ROW_OCTETS = 88
"""Octets of a simulated command in a catalogue, in addition to its name and its code: interface, hashes and lengths."""


class Broken(AssertionError):
    """A promise is broken."""


def content_of(snapshot: Snapshot) -> State:
    """Name → unsigned code, read from the octets of a snapshot. The results for the same octets are remembered."""
    return _read(bytes(snapshot.buffer[: len(snapshot.body)]), snapshot.footer.key_id != UNSIGNED)


@lru_cache(maxsize=64)
def _read(body: bytes, signed: bool) -> State:
    return {
        definition.name.encode(): payload_of(definition.code) if signed else definition.code
        for number, _, message in wire.fields(memoryview(body))
        if number == wire.COMMANDS
        for definition in (parse_definition(message),)
    }


class Promises:
    """The model: it knows the catalogues that passed, and judges those that are served. ``now`` returns the virtual
    time, for messages."""

    def __init__(self, table: Table, now: Callable[[], float]) -> None:
        self._table, self._now = table, now
        self.passed: dict[str, State] = {}
        """Version → content, for all catalogues that passed the guard, in this life of the master or an earlier one."""
        self.accepted: set[str] = set()
        self.comparable: State | None = None
        """The newest catalogue that passed, as far as this master can know it."""
        self.served_last: State | None = None
        self.unjudged = False
        """Whether rows that no checker could judge may be served."""
        self.tolerated: set[bytes] = set()
        """Bad code that the first review of a master let pass because there was much of it."""
        self.checks = 0
        self.first_broken: Broken | None = None
        """The first broken promise. It is kept because the server may catch the exception, as it does with those of its
        own parts, and break more promises later."""

    def _expect(self, condition: bool, text: str) -> None:
        self.checks += 1
        if not condition:
            broken = Broken(f"at {self._now():.3f} s: {text}")
            self.first_broken = self.first_broken or broken
            raise broken

    def on_passed(self, snapshot: Snapshot) -> None:
        """``snapshot`` passed the guard."""
        version, content = snapshot.version_hash, content_of(snapshot)
        if version not in self.passed:
            if version not in self.accepted:
                self._compare(version, content)
            bad = {code for code in content.values() if code.startswith(BAD)} - self.tolerated
            self._expect(not bad or self.unjudged, f"{version[:8]} has code that clients refuse: {sorted(bad)[:3]}")
        known = self.passed.setdefault(version, content)
        self._expect(known == content, f"{version[:8]} has another content than when it passed before")
        self.comparable = content

    def _compare(self, version: str, content: State) -> None:
        before = self.comparable
        self._expect(bool(content), f"the empty catalogue {version[:8]} passed")
        if before is None:
            return
        lost = len(before.keys() - content.keys())
        self._expect(
            lost <= 5 or lost <= 0.2 * len(before), f"{version[:8]} passed without {lost} of {len(before)} commands"
        )
        sizes = [sum(len(name) + len(code) + _ROW_OCTETS for name, code in each.items()) for each in (before, content)]
        # The model's count of octets differs by a few for each row.
        self._expect(
            sizes[1] - sizes[0] <= 1.1 * SMALL_GROWTH or sizes[1] <= 2.1 * sizes[0],
            f"{version[:8]} passed with {sizes[1]} octets after {sizes[0]}",
        )

    def on_published(self, snapshot: Snapshot, previous_generation: int, *, pinned: bool) -> None:
        """The master publishes ``snapshot``."""
        version, content = snapshot.version_hash, content_of(snapshot)
        self._expect(version in self.passed, f"{version[:8]} is served, and never passed")
        self._expect(snapshot.generation > previous_generation, f"generation {snapshot.generation} is no new one")
        if not pinned and self.served_last is not None and version not in self.accepted:
            commit, before = self._commit(content), self._commit(self.served_last)
            self._expect(
                commit >= before, f"the state of commit {commit} is served after that of commit {before}, without a pin"
            )
        self.served_last = None if pinned else content

    def _commit(self, content: State) -> int:
        """The last commit after which the table had the state that ``content`` was read from."""
        return self._table.last_commit_of[content.get(CLOCK, b"")]

    def on_worker(self, snapshot: Snapshot, announced: str, generation_before: int) -> None:
        """A worker begins to serve ``snapshot``."""
        version = snapshot.version_hash
        self._expect(version == announced, f"{version[:8]} arrived, and {announced[:8]} was announced")
        self._expect(self.passed.get(version) == content_of(snapshot), f"{version[:8]} is not what passed")
        self._expect(snapshot.generation > generation_before, "a worker's generation goes back")

    def expect_fresh(self, served: Snapshot, ever_good: dict[bytes, set[bytes]]) -> None:
        """Check that ``served`` agrees with the table, as far as its rows are good.

        Args:
            served: The catalogue that a worker serves.
            ever_good: Name → the good codes that its row ever had.
        """
        content, rows = content_of(served), self._table.rows
        extra = content.keys() - rows.keys()
        self._expect(not extra, f"commands that the table does not have: {sorted(extra)[:3]}")
        for name, code in rows.items():
            if not code.startswith(BAD):
                self._expect(content.get(name) == code, f"{name!r} is not served as it is in the table")
            elif name in content:
                good = content[name] in ever_good.get(name, set()) or content[name] in self.tolerated
                self._expect(good, f"{name!r} is held at {content[name]!r}, which was never good")
