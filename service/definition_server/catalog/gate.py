"""The gate: a row whose content clients refuse does not replace a good version of its command.

Theory of operation. A `Review` goes over the rows of one reading. It skips rows whose content hash passed before. The
content of each other row is judged by `content_check`, unless it was judged before: verdicts are remembered by content.
Then each row has one of three verdicts:

- *serve*: the row is good. A row that could not be judged yet is served too, and stays *pending*.
- *hold*: the row is bad, and the last catalogue has a good version of its command, which is served in its place. Rows
  that cannot become a definition (no code, too large, not UTF-8) are held in the same way.
- *leave out*: the row is bad, and there never was a good version. One missing command is better than clients that
  refresh nothing because of it.

If the first review refuses the code of a large part of a catalogue, it is more likely that the clients run another
version of Python than that all this code is broken. These rows are then served as suspect.
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain

from definition_server.catalog.builder import RowFacts, SnapshotBuilder
from definition_server.catalog.content_check import FUNCTION, INTERFACE, MODULE, Flaw
from definition_server.catalog.definition import Row, Unserved, parse_definition, shown
from definition_server.catalog.signing import UNSIGNED, payload_of
from definition_server.catalog.snapshot import Snapshot
from definition_server.catalog.validation import Suspect

REMEMBERED = 65_536
"""So many verdicts are remembered, in about 10 MB. The content hash of each served row is kept too; this limit does not
apply to these hashes.
"""

_NOTHING = (b"", Flaw.NONE)

MANY_ROWS, MANY_PERCENT = 5, 5
"""If the code of more rows than this, and of a larger share, is refused, the clients probably have another version of
Python.
"""


class Verdict(Enum):
    """The verdict on a row."""

    SERVE = "serve"
    HOLD = "hold"
    LEAVE_OUT = "leave_out"


@dataclass(frozen=True, slots=True)
class Held:
    """A command that is held at its last good version."""

    name: str
    reason: Unserved
    since: float
    """Seconds since the epoch: when this row was first seen; after a restart, when it was first read again."""
    hash_served: str
    hash_refused: str
    """Empty if the row was not read in full (too large) or has no hash (no code, not UTF-8)."""


@dataclass(frozen=True, slots=True)
class Change:
    """The changes that a review made, for the log."""

    held: tuple[Held, ...]
    """Commands that are held now, and were not held before with this content and for this reason."""
    released: tuple[str, ...]
    """Commands that are no longer held: their rows were mended, or deleted from the table."""
    left_out: tuple[tuple[str, Unserved], ...]
    """Commands that are now left out because of their content, and were not before."""
    tolerated: int
    """Rows that are served as suspect since this review."""


class Gate:
    """Keeps the verdicts on contents of rows from review to review. Not thread-safe."""

    def __init__(self, code: str = "module", interface: str = "on", *, remembered: int = REMEMBERED) -> None:
        """
        Args:
            code: The setting ``GATE_CODE``.
            interface: The setting ``GATE_INTERFACE``.
            remembered: The most verdicts that are remembered.
        """
        self.checks = {"module": MODULE, "function": FUNCTION, "off": 0}[code]
        self.checks |= INTERFACE if interface == "on" else 0
        self._salt = f"{self.checks} {sys.version}".encode()
        self._remembered = remembered
        # Hash of a content → its flaws. The least recently used is first.
        self._flaws: OrderedDict[bytes, Flaw] = OrderedDict()
        # Results of the last review, by name. `served`: the content hash of every served command. `pending`: the
        # content hashes of those that are not judged yet. `tolerated`: the content hashes of those whose code was
        # refused. `suspect`: rows that passed with a suspicion.
        self.served: dict[bytes, bytes] = {}
        self.pending: dict[bytes, bytes] = {}
        self.tolerated: dict[bytes, bytes] = {}
        self.suspect: set[bytes] = set()
        self.held: dict[bytes, Held] = {}
        self.left_out: dict[bytes, Unserved] = {}
        # By name, the content hash and flaws of rows that were served before they were judged, and then found bad.
        self.found: dict[bytes, tuple[bytes, Flaw]] = {}
        self.first = True
        """True until every row of a catalogue has been judged once."""

    def key(self, name: bytes, interface: bytes, code: bytes) -> bytes:
        """Identifies the content of a row and the checks that apply to it. It does not depend on the row's name."""
        digest = hashlib.sha256(b"%b\0%d %d\0" % (self._salt, b"\0" in name, len(interface)))
        digest.update(interface)
        digest.update(code)
        return digest.digest()[:16]

    def known(self, key: bytes) -> Flaw | None:
        """The remembered flaws of a content; None if the content was not judged, or the verdict on it is forgotten."""
        flaws = self._flaws.get(key)
        if flaws is not None:
            self._flaws.move_to_end(key)
        return flaws

    def remember(self, key: bytes, flaws: Flaw) -> None:
        """Remember the flaws of a content."""
        self._flaws[key] = flaws
        self._flaws.move_to_end(key)
        if len(self._flaws) > self._remembered:
            self._flaws.popitem(last=False)

    def was_judged(self, name: bytes, digest: bytes | None) -> bool:
        """Whether ``name`` is served with this content hash, and this content was judged good or is tolerated."""
        return digest is not None and self.served.get(name) == digest and name not in self.pending

    def note_pending(self, name: bytes, digest: bytes, flaws: Flaw) -> bool:
        """Note the flaws of a row that was judged while it was served. Returns whether the next review will refuse the
        row.
        """
        if self.pending.get(name) != digest:
            return False
        if reason_of(flaws) is not None:
            self.found[name] = digest, flaws
            return True
        del self.pending[name]
        if flaws & Flaw.NOT_STRICT_JSON:
            self.suspect.add(name)
        return False


def reason_of(flaws: Flaw) -> Unserved | None:
    """The reason why a row with these flaws is not served; None if it is served."""
    if flaws & Flaw.INTERFACE:
        return Unserved.INTERFACE_INVALID
    return Unserved.CODE_INVALID if flaws & Flaw.CODE else None


def facts_of(message: bytes | memoryview, *, signed: bool) -> RowFacts:
    """The parts of the row from which a ``CommandResponse`` was made."""
    found = parse_definition(memoryview(message))
    code = payload_of(found.code) if signed else found.code
    return RowFacts(found.internal_id or None, found.type.encode(), found.interface_json.encode(), code)


class Review:
    """The review of one reading. Its methods are called in this order: `unjudged`; `note` for each row that it yielded;
    `doubtful`; `note_last` for each version that it yielded; `settle`.
    """

    def __init__(self, gate: Gate, builder: SnapshotBuilder, last_good: Snapshot | None) -> None:
        """``last_good``: the last catalogue that passed; None if there is none."""
        self._gate = gate
        self._builder = builder
        self._last = last_good
        self._digests = builder.digests()
        self._faults = builder.faults()
        # The flaws that this review found, by name.
        self._flaws: dict[bytes, Flaw] = {}
        self._last_flaws: dict[bytes, Flaw] = {}
        # `_changed`: the rows whose content differs from the served content. `_no_longer_pending`: the pending rows
        # that changed or are gone.
        self._changed: list[bytes] = []
        self._no_longer_pending: set[bytes] = set()
        self._new: list[bytes] = []

    def find_changed(self) -> None:
        """Find the rows whose content differs from the served content. O(rows), unless the builder has compared them
        with `Gate.served`. May run in another thread than the other methods.
        """
        gate, digests = self._gate, self._digests
        self._changed = self._builder.differing(gate.served)
        self._no_longer_pending = (gate.pending.keys() & self._changed) | (gate.pending.keys() - digests.keys())
        found = gate.found.copy()  # another thread may add rows during an iteration
        self._flaws = {name: flaws for name, (digest, flaws) in found.items() if digests.get(name) == digest}
        if not self._flaws and not (gate.first and self._last is not None):
            self._new = self._changed  # no row is skipped: a loop over all would take long
            return
        for name in self._changed:
            if name not in self._flaws and not (gate.first and self._last_digest(name) == digests[name]):
                self._new.append(name)

    @property
    def complete(self) -> bool:
        """Whether the catalogue can be served without judging a row first."""
        return not self._new

    def unjudged(self) -> Iterator[tuple[bytes, RowFacts, bytes]]:
        """Name, content and key of each row that must be judged before it is served.

        Two kinds of row are skipped. A row that is served already, or that the stored catalogue has, is pending and is
        judged while it is served. For a row whose content was judged before, the remembered flaws are noted.
        """
        for name in self._new:
            facts = self._builder.row_facts(name)
            key = self._gate.key(name, facts.interface, facts.code)
            known = self._gate.known(key)
            if known is not None:
                self._flaws[name] = known
            else:
                yield name, facts, key

    def note(self, name: bytes, flaws: Flaw) -> None:
        """Note ``flaws`` of the row ``name``, which `unjudged` has yielded."""
        self._flaws[name] = flaws

    def doubtful(self) -> Iterator[tuple[bytes, RowFacts, bytes]]:
        """Name, content and key of each last good version that would be served in place of a bad row, and that was
        never judged: a stored catalogue may come from a server without the gate.
        """
        gate = self._gate
        for name in self._refused():
            digest = self._last_digest(name)
            if digest is None or gate.was_judged(name, digest):
                continue
            if digest == self._digests.get(name):
                self._last_flaws[name] = self._flaws[name]
                continue
            facts = self._last_facts(name)
            key = gate.key(name, facts.interface, facts.code)
            known = gate.known(key)
            if known is not None:
                self._last_flaws[name] = known
            else:
                yield name, facts, key

    def note_last(self, name: bytes, flaws: Flaw) -> None:
        """Note ``flaws`` of a last good version that `doubtful` has yielded."""
        self._last_flaws[name] = flaws

    def settle(self, now: float) -> Change:
        """Let the builder serve, hold or leave out each row.

        Args:
            now: Seconds since the epoch.
        """
        gate, builder = self._gate, self._builder
        tolerated = self._tolerable()
        held: dict[bytes, Held] = {}
        left_out: dict[bytes, Unserved] = {}
        for name, reason in self._refused().items():
            if name in tolerated:
                continue
            if self._verdict(name) is Verdict.HOLD:
                held[name] = self._hold(name, reason, now)
            elif name in self._digests:
                builder.leave_out(name, reason)
                left_out[name] = reason
        change = Change(
            held=tuple(each for name, each in held.items() if gate.held.get(name) != each),
            released=tuple(shown(name) for name in gate.held if name not in held),
            left_out=tuple((shown(name), why) for name, why in left_out.items() if gate.left_out.get(name) != why),
            tolerated=sum(gate.tolerated.get(name) != self._digests[name] for name in tolerated),
        )
        gate.held, gate.left_out = held, left_out
        self._remember_served(tolerated)
        self._report(change)
        return change

    # -- parts of `settle` -----------------------------------------------------------------------------------------

    def _refused(self) -> dict[bytes, Unserved]:
        """Name → reason, for each name whose row is bad; in name order."""
        found = {name: reason for name, flaws in self._flaws.items() if (reason := reason_of(flaws)) is not None}
        found |= {name: reason for name, reason in self._faults.items() if self._last_digest(name) is not None}
        return dict(sorted(found.items()))

    def _verdict(self, name: bytes) -> Verdict:
        if self._last_digest(name) is None or reason_of(self._last_flaws.get(name, Flaw.NONE)) is not None:
            return Verdict.LEAVE_OUT
        return Verdict.HOLD

    def _tolerable(self) -> set[bytes]:
        """The rows whose refused code is served nevertheless."""
        gate = self._gate
        kept = {name for name, digest in gate.tolerated.items() if self._digests.get(name) == digest}
        refused = {
            name
            for name, flaws in self._flaws.items()
            if reason_of(flaws) is Unserved.CODE_INVALID and self._no_good_version(name)
        }
        # If the previous version was refused too and is served nevertheless, this version is no worse.
        kept |= {name for name in refused if name in gate.tolerated}
        # A row that a stored catalogue does not have is not counted: clients have worked without that command so far.
        known = {name for name in refused if not self._last or self._last_digest(name) is not None}
        if gate.first and len(known) > MANY_ROWS and 100 * len(known) > MANY_PERCENT * self._judged():
            kept |= known
        return kept

    def _no_good_version(self, name: bytes) -> bool:
        digest = self._last_digest(name)
        return self._verdict(name) is Verdict.LEAVE_OUT or digest == self._gate.tolerated.get(name)

    def _judged(self) -> int:
        """Number of rows whose content has been judged."""
        pending = len(self._gate.pending) - len(self._no_longer_pending)
        return len(self._digests) - len(self._changed) - pending + len(self._flaws)

    def _hold(self, name: bytes, reason: Unserved, now: float) -> Held:
        assert self._last is not None
        message = self._last.answer(name)
        assert message is not None
        if self._last.footer.key_id != self._builder.key_id:
            message = self._builder.encode(self._last_row(name))
        self._builder.hold(name, message, reason)
        refused = self._digests.get(name, b"").decode()
        earlier = self._gate.held.get(name)
        same = earlier is not None and (earlier.reason, earlier.hash_refused) == (reason, refused)
        since = earlier.since if same and earlier is not None else now
        return Held(shown(name), reason, since, message[-64:].decode(), refused)

    def _remember_served(self, tolerated: set[bytes]) -> None:
        """Remember which versions are served now: the ``tolerated`` ones in a table of their own."""
        gate = self._gate
        # This dict has an entry for each row. It is changed in place, because a copy would take long.
        served = self._digests
        for name in gate.left_out:
            del served[name]
        served |= {name: held.hash_served.encode() for name, held in gate.held.items()}
        # A version that is served in place of a bad row may not be judged yet.
        judged = self._flaws.keys() - gate.held.keys()
        judged |= {name for name in gate.held if name in self._last_flaws or gate.was_judged(name, served[name])}
        # Changed in place: most pending rows stay pending, and a large catalogue has many of them, for minutes.
        pending = gate.pending
        for name in chain(self._no_longer_pending, judged, gate.held, gate.left_out):
            pending.pop(name, None)
        # The names are in the order of reading, because sorting the names of all rows would take long.
        for name in chain(self._changed, gate.held):
            if name in served and name not in judged and name not in tolerated:
                pending[name] = served[name]
        gate.tolerated = {name: served[name] for name in tolerated}
        # Rows that were found bad after `find_changed` are left to the next review.
        gate.found = {
            name: found
            for name, found in gate.found.items()
            if name not in self._flaws and pending.get(name) == found[0]
        }
        suspect = {name for name in gate.suspect if gate.served.get(name) == served.get(name)}
        suspect |= {name for name, flaws in self._flaws.items() if flaws & Flaw.NOT_STRICT_JSON and name in served}
        gate.served = served
        gate.suspect = suspect - gate.held.keys() - tolerated
        gate.first = gate.first and bool(gate.pending)

    def _report(self, change: Change) -> None:
        """Note the held, suspect and unjudged rows in the builder's findings."""
        findings, gate = self._builder.findings, self._gate
        for held in gate.held.values():
            findings.held[held.reason] += 1
        findings.unchecked = len(gate.pending)
        self._note_suspects(gate.tolerated, Suspect.CODE_INVALID_HERE)
        self._note_suspects(gate.suspect, Suspect.INTERFACE_NOT_JSON_ARRAY)

    def _note_suspects(self, names: Iterable[bytes], why: Suspect) -> None:
        for name in names:
            self._builder.findings.note(why, Row(self._builder.id_of(name), name, None, None, None))

    # -- the last good catalogue -----------------------------------------------------------------------------------

    def _last_digest(self, name: bytes) -> bytes | None:
        message = None if self._last is None else self._last.answer(name)
        return None if message is None else message[-64:]

    def _last_facts(self, name: bytes) -> RowFacts:
        assert self._last is not None
        message = self._last.answer(name)
        assert message is not None
        return facts_of(message, signed=self._last.footer.key_id != UNSIGNED)

    def _last_row(self, name: bytes) -> Row:
        assert self._last is not None
        definition = self._last.get(name.decode())
        assert definition is not None
        facts = self._last_facts(name)
        bytecode = (definition.avbc_code or None, definition.avbc_version or None)
        return Row(facts.id, name, facts.type, facts.interface, facts.code, *bytecode)
