"""The wishes of operators: catalogues that they accept, and a pin. They are kept on disk, so that they survive a
restart.

A pin makes the server serve one version until a certain time, whatever the table holds. A pin may come from the command
(`definition-server pin`, kept here) and from the policy file of the installation. The pin by command takes precedence,
because it was given to this server. A hash that was accepted by command is used up when its catalogue has been
published; a hash in the policy file is accepted as long as it is in the file.

A pin decides which catalogue is served, and an accepted hash passes the guard. So the file must meet the rules of the
stored snapshots (`store`): it is a regular file of this user to which no other user may write, and with
AVAP_INTERNAL_KEY it carries a MAC of that key. A file that breaks these rules stays as it is until the next write moves
it aside.
"""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from definition_server.catalog.signing import Signer
from definition_server.control_plane.store import OPEN_FLAGS, OwnFile, StoreError, keep_aside
from definition_server.observability.reasons import Reason

FILE_NAME = "wishes.json"
_DAMAGED_SUFFIX = ".damaged"
PREFIX_DIGITS = 8
"""The smallest number of hex digits that identify a version."""

_MOST_ACCEPTED = 100
_MOST_OCTETS = 1 << 20
_MOST_ROWS = 1 << 31
LATEST_SECONDS = 253_402_300_799
"""The last second of the year 9999: the latest instant that the status can show."""
_VERSION = re.compile(rf"[0-9a-f]{{{PREFIX_DIGITS},64}}")


@dataclass(frozen=True, slots=True)
class Pin:
    """The wish that ``version`` is served, and no other version."""

    version: str
    """Hex hash, or a beginning of it of at least `PREFIX_DIGITS` digits."""
    until: float | None = None
    """Seconds since the epoch; None if the pin lasts until it is taken away."""
    source: str = "command"
    """``command`` or ``policy``."""

    @property
    def until_text(self) -> str | None:
        """The end of the pin as ISO 8601 in UTC, for display; None if `until` is None."""
        return None if self.until is None else datetime.fromtimestamp(self.until, UTC).isoformat(timespec="seconds")

    def active(self, now: float) -> bool:
        """Whether the pin has not expired."""
        return self.until is None or now < self.until

    def names(self, version: str) -> bool:
        """Whether the pin names ``version``, a whole hash."""
        return version.startswith(self.version)


@dataclass(frozen=True, slots=True)
class Policy:
    """The wishes that the policy file of the installation declares."""

    accept: tuple[str, ...] = ()
    pin: Pin | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """The wishes by command. Immutable; every change makes another."""

    accepted: tuple[str, ...] = ()
    """Whole hashes, the newest last."""
    pinned: Pin | None = None
    rows_held: int = 0
    """The number of rows that the gate held in the catalogue `rows_held_in`. It is not a wish. It is stored with the
    wishes for the first comparison after a restart.
    """
    rows_held_in: str = ""
    """The whole hash of the newest catalogue that passed the guard; empty if none of its rows is held."""

    def merge(self, policy: Policy, now: float) -> Merged:
        """The wishes in effect at ``now``, together with those of ``policy``."""
        pins = [pin for pin in (self.pinned, policy.pin) if pin is not None and pin.active(now)]
        pin = pins[0] if pins else None
        if pin is not None and pin is policy.pin:
            pin = replace(pin, source="policy")
        return Merged(self.accepted, policy.accept, pin)

    def accept(self, version: str) -> Wishes:
        """A copy with ``version`` accepted. If there are too many hashes, the oldest is forgotten."""
        others = tuple(other for other in self.accepted if other != version)
        return replace(self, accepted=(*others, version)[-_MOST_ACCEPTED:])

    def use_up(self, version: str) -> Wishes:
        """A copy in which ``version`` is no longer accepted, because it was published."""
        return replace(self, accepted=tuple(other for other in self.accepted if other != version))

    def pin(self, pin: Pin | None) -> Wishes:
        """A copy with another pin, or without a pin."""
        return replace(self, pinned=pin)

    def hold_rows(self, count: int, version: str) -> Wishes:
        """A copy with ``count`` rows held in the catalogue ``version``."""
        return replace(self, rows_held=count, rows_held_in=version if count else "")

    def to_json(self, signer: Signer | None = None) -> str:
        """The text of the file, with the MAC of ``signer``."""
        pin = None if self.pinned is None else {"version": self.pinned.version, "until": self.pinned.until}
        document: dict[str, Any] = {"accept": list(self.accepted), "pin": pin, "rows_held": self.rows_held}
        if self.rows_held_in:
            document["rows_held_in"] = self.rows_held_in
        if signer is not None:
            document["mac"] = _mac_of(document, signer)
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, signer: Signer | None = None) -> Wishes:
        """The wishes and the count that the file holds.

        Args:
            text: The content of the file.
            signer: If given, the file must have a MAC that this signer accepts.

        Raises:
            NotAuthentic: if it has another MAC or none. ValueError: if it is damaged.
        """
        try:
            document = json.loads(text)
            if not isinstance(document, dict) or not isinstance(accepted := document.get("accept"), list):
                raise ValueError("it is not an object with a list `accept`")
            if signer is not None:
                _check_mac(document, signer)
        except RecursionError:
            raise ValueError("it is nested too deep") from None
        for version in accepted:
            _check_version(version)
        pin = document.get("pin")
        rows_held = document.get("rows_held", 0)
        if isinstance(rows_held, bool) or not isinstance(rows_held, int) or not 0 <= rows_held < _MOST_ROWS:
            raise ValueError("`rows_held` is not a count")
        version = _check_version(document["rows_held_in"]) if "rows_held_in" in document else ""
        return cls(tuple(accepted[-_MOST_ACCEPTED:]), None if pin is None else _pin_of(pin), rows_held, version)


class NotAuthentic(ValueError):
    """The file has no MAC of ours. The message gives the reason why the file is not used."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The wishes that are in effect, by command and by policy."""

    accepted: tuple[str, ...] = ()
    """By command."""
    declared: tuple[str, ...] = ()
    """The hashes that the policy file accepts, or beginnings of hashes of at least `PREFIX_DIGITS` digits."""
    pin: Pin | None = None

    def accepts(self, version: str) -> bool:
        """Whether an operator accepts the catalogue ``version``."""
        return version in self.accepted or any(
            len(prefix) >= PREFIX_DIGITS and version.startswith(prefix) for prefix in self.declared
        )


class WishesFile(OwnFile):
    """``SNAPSHOT_DIR/wishes.json``. Blocks; run it in a thread."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / FILE_NAME)

    def read(self, signer: Signer | None = None) -> Wishes:
        """The stored wishes; empty if there is no file.

        Args:
            signer: If given, the file must have a MAC that this signer accepts.

        Raises:
            NotOurs: if somebody else may have written the file. The next write moves it aside.
            StoreError: if the file cannot be read or is damaged. A damaged file is renamed and kept.
        """
        try:
            number = os.open(self.path, OPEN_FLAGS)
            try:
                self._check_owner(os.fstat(number))
                with os.fdopen(number, "rb", closefd=False) as file:
                    octets = file.read(_MOST_OCTETS + 1)
            finally:
                os.close(number)
        except FileNotFoundError:
            return Wishes()
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._refused("it is a symbolic link") from None
            raise StoreError(f"cannot read {self.path}: {error.strerror}", Reason.DISK_FAILED) from error
        try:
            if len(octets) > _MOST_OCTETS:
                raise ValueError("it is too large")
            return Wishes.from_json(octets.decode(), signer)
        except NotAuthentic as error:
            raise self._refused(str(error)) from None
        except ValueError as error:
            try:
                kept = f"is kept as {keep_aside(self.path, _DAMAGED_SUFFIX)}"
            except OSError as problem:
                kept = f"cannot be kept beside it ({problem.strerror})"
            raise StoreError(f"{self.path} is damaged ({error}); it {kept}, and nothing in it takes effect") from None

    def write(self, wishes: Wishes, signer: Signer | None = None) -> None:
        """Replace the file, with the MAC of ``signer``, or leave it as it is.

        Raises:
            StoreError: if that fails.
        """
        self._replace(lambda file: file.write(wishes.to_json(signer).encode()))


def _mac_of(document: dict[str, Any], signer: Signer) -> str:
    return signer.wishes_mac(_covered(document)).hex()


def _covered(document: dict[str, Any]) -> bytes:
    """The content in one fixed form, so that the MAC does not depend on the layout of the text."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _octets_of(mac: str) -> bytes:
    try:
        return bytes.fromhex(mac)
    except ValueError:
        return b""


def _check_mac(document: dict[str, Any], signer: Signer) -> None:
    content = {name: value for name, value in document.items() if name != "mac"}
    mac = document.get("mac")
    if mac is None:
        raise NotAuthentic("it has no MAC: it was not written by a server with AVAP_INTERNAL_KEY")
    if not isinstance(mac, str) or not signer.made_wishes_mac(_octets_of(mac), _covered(content)):
        raise NotAuthentic("its MAC is not ours: it was changed, or written with another AVAP_INTERNAL_KEY")


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
        raise ValueError("`until` is not a time")
    return Pin(_check_version(value.get("version")), until)
