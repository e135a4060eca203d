"""The guard: judges a whole catalogue before it replaces another, and holds a catalogue that looks like an accident.

A single bad row is a matter for the gate. If a table lost or doubled its rows, each remaining row is good by itself. So
the guard compares the catalogues, and a change that is too large waits for an operator, who accepts the catalogue by
its hash. A change of a few rows never waits, even if these rows are a large share of a small table. A command whose
code becomes blank counts as removed.

If a table loses its rows in small steps, a comparison of each catalogue with the one before finds nothing. So each
catalogue is also compared with the *baseline*, the catalogue that was served at some earlier time: a catalogue that
removes more than a few commands is held if too many have been removed since the baseline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum

from definition_server.catalog import wire
from definition_server.catalog.blank_code import has_blank_code, has_blank_code_after
from definition_server.catalog.definition import shown
from definition_server.catalog.signing import OVERHEAD, UNSIGNED
from definition_server.catalog.snapshot import Snapshot

FEW_COMMANDS = 5
"""The guard never holds a catalogue for removing, or holding, so many commands at once."""

SMALL_GROWTH = 1 << 20
"""The guard never holds a catalogue for growing by so many octets at once."""

_NAMES = 10


class Concern(StrEnum):
    """The fault of a catalogue as a whole."""

    EMPTIED = "emptied"
    SHRUNK = "shrunk"
    GROWN = "grown"
    ROWS_HELD = "rows_held"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The largest changes that need no operator."""

    removed_percent: float = 20.0
    """Share of the commands that may be removed."""
    growth_percent: float = 100.0
    """Share by which the octets may grow."""
    held_percent: float = 20.0
    """Share of the commands whose row may be held by the gate."""
    changed_percent: float = 100.0
    """Share of the commands whose content may change. 100 allows all, because a release may change every command."""


DEFAULTS = Thresholds()


@dataclass(frozen=True, slots=True)
class Contents:
    """The properties of a catalogue that the guard compares."""

    version: str
    names: AbstractSet[bytes]
    octets: int
    """Octets without the signatures: a catalogue that is signed with another key has the same content."""
    blank: AbstractSet[bytes] = frozenset()
    """The names of commands whose code is empty or only white space."""
    hashes: Mapping[bytes, bytes] = field(default_factory=dict)
    """Name → content hash; empty if changes are not counted."""

    @classmethod
    def of(cls, snapshot: Snapshot, *, with_hashes: bool = False) -> Contents:
        """The contents of ``snapshot``. O(commands)."""
        overhead = 0 if snapshot.footer.key_id == UNSIGNED else OVERHEAD
        names, blank, hashes = [], [], {}
        for message in snapshot.messages():
            length, start = wire.read_varint(message, 1)
            name = bytes(message[start : start + length])
            names.append(name)
            if with_hashes:
                hashes[name] = bytes(message[-64:])
            if has_blank_code_after(message, start + length, overhead):
                blank.append(name)
        octets = len(snapshot.body) - overhead * len(names)
        return cls(snapshot.version_hash, frozenset(names), octets, frozenset(blank), hashes)

    @classmethod
    def built(
        cls, snapshot: Snapshot, digests: Mapping[bytes, bytes], blank: AbstractSet[bytes], *, with_hashes: bool = False
    ) -> Contents:
        """The same as `of`, from the data of the builder that built ``snapshot``, which is not read.

        Args:
            snapshot: The catalogue.
            digests: The content hash of each of its commands, by name.
            blank: The names of its commands whose code is blank.
            with_hashes: Whether the result has the hashes.
        """
        overhead = 0 if snapshot.footer.key_id == UNSIGNED else OVERHEAD
        octets = len(snapshot.body) - overhead * len(digests)
        hashes = digests if with_hashes else {}
        return cls(snapshot.version_hash, frozenset(digests), octets, frozenset(blank), hashes)

    def after(self, later: Snapshot, changed: Iterable[bytes], *, with_hashes: bool = False) -> Contents:
        """The contents of ``later``, in which only the names in ``changed`` may differ. O(changed), or O(names) if
        names were added or removed.
        """
        overhead = 0 if later.footer.key_id == UNSIGNED else OVERHEAD
        found = {name: later.answer(name) for name in changed}
        there = {name for name, message in found.items() if message is not None}
        names = self.names
        if not names >= there or len(names) != later.count:
            names = (names - found.keys()) | there
        blank = {
            name for name, message in found.items() if message is not None and has_blank_code(message, overhead)
        } | (self.blank - found.keys())
        hashes: dict[bytes, bytes] = {}
        if with_hashes:
            hashes = {name: digest for name, digest in self.hashes.items() if name not in found}
            hashes |= {name: message[-64:] for name, message in found.items() if message is not None}
        return Contents(later.version_hash, names, len(later.body) - overhead * later.count, blank, hashes)

    def lost_in(self, later: Contents) -> AbstractSet[bytes]:
        """The commands that are not in ``later``, or whose code is blank in ``later`` but not in this catalogue."""
        gone = frozenset[bytes]() if self.names is later.names else self.names - later.names
        return gone | ((self.names & later.blank) - self.blank)

    def changed_in(self, later: Contents) -> AbstractSet[bytes]:
        """The commands whose content is different in ``later``."""
        return {name for name, digest in self.hashes.items() if later.hashes.get(name, digest) != digest}


@dataclass(frozen=True, slots=True)
class Judgement:
    """Why a catalogue is held."""

    concern: Concern
    text: str
    """For the log: the figures and the threshold."""
    names: tuple[str, ...] = ()
    """Up to ten of the removed, held or changed commands."""


def judge(
    candidate: Contents,
    served: Contents | None,
    baseline: Contents | None = None,
    *,
    held: AbstractSet[bytes] = frozenset(),
    held_before: int = 0,
    limits: Thresholds = DEFAULTS,
) -> Judgement | None:
    """Why ``candidate`` must not replace ``served`` before an operator accepts it; None if it may.

    Args:
        candidate: The catalogue that was read.
        served: The catalogue that was published last; None if there is none to compare with.
        baseline: The catalogue that was served at some earlier time.
        held: The commands of ``candidate`` whose row the gate holds.
        held_before: The number of commands that it held in ``served``.
        limits: The largest changes that need no operator.
    """
    if not candidate.names:
        return Judgement(
            Concern.EMPTIED, "nothing in it can be served", _examples(served.names if served else frozenset())
        )
    if served is None or candidate.version == served.version:
        return None
    return (
        _shrunk(candidate, served, baseline, limits)
        or _grown(candidate, served, baseline, limits)
        or _too_many_held(candidate, held, held_before, limits)
        or _changed(candidate, served, baseline, limits)
    )


def _shrunk(candidate: Contents, served: Contents, baseline: Contents | None, limits: Thresholds) -> Judgement | None:
    if len(served.lost_in(candidate)) <= FEW_COMMANDS:
        return None
    for before, since in ((served, "are served"), (baseline, "were served at the guard's baseline")):
        if before is None:
            continue
        removed = before.lost_in(candidate)
        if _percent(len(removed), len(before.names)) > limits.removed_percent:
            text = (
                f"{len(removed)} of {len(before.names)} commands that {since} would vanish"
                f"{_of_which_blank(removed, candidate)}, more than {limits.removed_percent:g} % "
                "(GUARD_MAX_REMOVED_PERCENT)"
            )
            return Judgement(Concern.SHRUNK, text, _examples(removed))
    return None


def _of_which_blank(removed: AbstractSet[bytes], candidate: Contents) -> str:
    blank = len(removed & candidate.blank)
    return f" ({blank} of them by blank code)" if blank else ""


def _grown(candidate: Contents, served: Contents, baseline: Contents | None, limits: Thresholds) -> Judgement | None:
    if candidate.octets - served.octets <= SMALL_GROWTH:
        return None
    for before in (served, baseline):
        if before is None:
            continue
        if _percent(candidate.octets - before.octets, before.octets) > limits.growth_percent:
            text = (
                f"it would grow from {before.octets} to {candidate.octets} octets, by more than "
                f"{limits.growth_percent:g} % (GUARD_MAX_GROWTH_PERCENT)"
            )
            return Judgement(Concern.GROWN, text, _examples(candidate.names - before.names))
    return None


def _too_many_held(
    candidate: Contents, held: AbstractSet[bytes], held_before: int, limits: Thresholds
) -> Judgement | None:
    if len(held) - held_before <= FEW_COMMANDS:
        return None
    if _percent(len(held), len(candidate.names)) <= limits.held_percent:
        return None
    text = (
        f"{len(held)} of {len(candidate.names)} commands would be served in an earlier version, more than "
        f"{limits.held_percent:g} % (GUARD_MAX_HELD_PERCENT)"
    )
    return Judgement(Concern.ROWS_HELD, text, _examples(held))


def _changed(candidate: Contents, served: Contents, baseline: Contents | None, limits: Thresholds) -> Judgement | None:
    if len(served.changed_in(candidate)) <= FEW_COMMANDS:
        return None
    for before in (served, baseline):
        if before is None:
            continue
        changed = before.changed_in(candidate)
        if _percent(len(changed), len(before.names)) > limits.changed_percent:
            text = (
                f"{len(changed)} of {len(before.names)} commands would have another content, more than "
                f"{limits.changed_percent:g} % (GUARD_MAX_CHANGED_PERCENT)"
            )
            return Judgement(Concern.CHANGED, text, _examples(changed))
    return None


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / max(1, whole)


def _examples(names: AbstractSet[bytes]) -> tuple[str, ...]:
    return tuple(shown(name) for name in sorted(names)[:_NAMES])
