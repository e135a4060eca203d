"""What operators asked for: catalogues that they accept, and a pin. Kept on disk, so that it survives a restart.

A pin makes the server serve one version, whatever the table says, until a time. Two places may name one: the command
(`definition-server pin`, kept here) and the policy file of the installation. The command's goes first, because it is
the nearer one: it was given to this server. A hash that was accepted by command is used up when it has been published;
one in the policy file counts for as long as it stands there.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkstemp

from definition_server.control_plane.store import StoreError
from definition_server.observability.reasons import Reason

FILE_NAME = "wishes.json"
PREFIX_DIGITS = 8
"""The least number of hex digits that name a version."""

_MOST_ACCEPTED = 100
_MOST_OCTETS = 1 << 20
_MOST_ROWS = 1 << 31
LATEST_SECONDS = 253_402_300_799
"""The last second of the year 9999: the latest instant that the status can show."""
_VERSION = re.compile(rf"[0-9a-f]{{{PREFIX_DIGITS},64}}")


@dataclass(frozen=True, slots=True)
class Pin:
    """Serve ``version`` and nothing else."""

    version: str
    """Hex hash, or a beginning of it of at least `PREFIX_DIGITS` digits."""
    until: float | None = None
    """Seconds since the epoch; None: until it is taken away."""
    source: str = "command"
    """``command`` or ``policy``."""

    def active(self, now: float) -> bool:
        """Whether it has not expired."""
        return self.until is None or now < self.until

    def names(self, version: str) -> bool:
        """Whether it names ``version``, a whole hash."""
        return version.startswith(self.version)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the policy file of the installation declares."""

    accept: tuple[str, ...] = ()
    pin: Pin | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked for by command. Immutable; every change makes another."""

    accepted: tuple[str, ...] = ()
    """Whole hashes, the newest last."""
    pinned: Pin | None = None
    rows_held: int = 0
    """How many rows the gate held in the newest catalogue that passed the guard: no wish, but kept with them, so that
    the first comparison after a restart knows it."""

    def merge(self, policy: Policy, now: float) -> Merged:
        """What counts at ``now``, with what ``policy`` declares."""
        pins = [pin for pin in (self.pinned, policy.pin) if pin is not None and pin.active(now)]
        pin = pins[0] if pins else None
        if pin is not None and pin is policy.pin:
            pin = replace(pin, source="policy")
        return Merged(self.accepted, policy.accept, pin)

    def accept(self, version: str) -> Wishes:
        """With ``version`` accepted. The oldest of very many is forgotten."""
        others = tuple(other for other in self.accepted if other != version)
        return replace(self, accepted=(*others, version)[-_MOST_ACCEPTED:])

    def use_up(self, version: str) -> Wishes:
        """Without ``version``, which is published."""
        return replace(self, accepted=tuple(other for other in self.accepted if other != version))

    def pin(self, pin: Pin | None) -> Wishes:
        """With another pin, or none."""
        return replace(self, pinned=pin)

    def to_json(self) -> str:
        """The text of the file."""
        pin = None if self.pinned is None else {"version": self.pinned.version, "until": self.pinned.until}
        return json.dumps({"accept": list(self.accepted), "pin": pin, "rows_held": self.rows_held}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Wishes:
        """What the file says.

        Raises:
            ValueError: where it is not a file of ours.
        """
        try:
            document = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deep") from None
        if not isinstance(document, dict) or not isinstance(accepted := document.get("accept"), list):
            raise ValueError("it is no object with a list `accept`")
        for version in accepted:
            _check_version(version)
        pin = document.get("pin")
        rows_held = document.get("rows_held", 0)
        if isinstance(rows_held, bool) or not isinstance(rows_held, int) or not 0 <= rows_held < _MOST_ROWS:
            raise ValueError("`rows_held` is no count")
        return cls(tuple(accepted[-_MOST_ACCEPTED:]), None if pin is None else _pin_of(pin), rows_held)


@dataclass(frozen=True, slots=True)
class Merged:
    """What counts now."""

    accepted: tuple[str, ...] = ()
    """By command."""
    declared: tuple[str, ...] = ()
    """By the policy file; hashes, or beginnings of at least `PREFIX_DIGITS` digits."""
    pin: Pin | None = None

    def accepts(self, version: str) -> bool:
        """Whether an operator accepts the catalogue ``version``."""
        return version in self.accepted or any(
            len(prefix) >= PREFIX_DIGITS and version.startswith(prefix) for prefix in self.declared
        )


class WishesFile:
    """``SNAPSHOT_DIR/wishes.json``. Blocks; run it in a thread."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME

    def read(self) -> Wishes:
        """What was asked for; nothing where there is no file.

        Raises:
            StoreError: where the file cannot be read, belongs to another user, or is damaged. A damaged one is kept
                beside it.
        """
        try:
            number = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK)
        except FileNotFoundError:
            return Wishes()
        except OSError as error:
            raise StoreError(f"cannot read {self.path}: {error.strerror}", Reason.DISK_FAILED) from error
        try:
            with os.fdopen(number, "rb") as file:
                self._check_owner(os.fstat(number))
                octets = file.read(_MOST_OCTETS + 1)
        except OSError as error:
            raise StoreError(f"cannot read {self.path}: {error.strerror}", Reason.DISK_FAILED) from error
        try:
            if len(octets) > _MOST_OCTETS:
                raise ValueError("it is too large")
            return Wishes.from_json(octets.decode())
        except ValueError as error:
            kept = self._keep_aside()
            raise StoreError(
                f"{self.path} is damaged ({error}); it is kept as {kept}, and nothing of it counts"
            ) from None

    def _check_owner(self, found: os.stat_result) -> None:
        if found.st_uid != os.geteuid():
            raise StoreError(f"{self.path} is not used: it belongs to user {found.st_uid}")
        if found.st_mode & 0o022:
            raise StoreError(f"{self.path} is not used: others may write it")

    def _keep_aside(self) -> Path:
        kept = self.path.with_name(self.path.name + ".damaged")
        with suppress(OSError):
            self.path.replace(kept)
        return kept

    def write(self, wishes: Wishes) -> None:
        """Replace the file, or leave it as it is.

        Raises:
            StoreError: where that fails.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            number, name = mkstemp(".tmp", f"{self.path.stem}.", self.path.parent)
            temporary = Path(name)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(wishes.to_json().encode())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise StoreError(f"cannot write {self.path}: {error.strerror}", Reason.DISK_FAILED) from error


def _check_version(version: object) -> str:
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise ValueError("a version is 8 to 64 hexadecimal digits")
    return version


def _pin_of(value: object) -> Pin:
    if not isinstance(value, dict):
        raise ValueError("a pin is an object")
    until = value.get("until")
    if until is not None and (
        isinstance(until, bool) or not isinstance(until, (int, float)) or not 0 <= until <= LATEST_SECONDS
    ):
        raise ValueError("`until` is no time")
    return Pin(_check_version(value.get("version")), until)
