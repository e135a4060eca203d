"""``PUBLICATION_POLICY``: a TOML file that says, for many replicas alike, which catalogues are accepted, and which one
is pinned.

    accept = ["3f9a0c12"]                 # hashes, or beginnings of at least 8 digits
    [pin]
    version = "3f9a0c12…"
    until = 2026-12-01T00:00:00Z          # without it, until the file has no pin

The file is read several times a second, whole, and judged by its content: a symbolic link that is swapped, as
Kubernetes does, changes that, and times of modification do not matter. A new content counts when two readings in a row
have found it, so that an editor which empties the file and then writes it removes no pin. A content that cannot be used
is logged once, and the policy before it stays; so it does where the file is gone.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from definition_server.control_plane.disk import on_disk
from definition_server.control_plane.wishes import LATEST_SECONDS, Pin, Policy
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

READ_SECONDS = 0.4
"""Between two readings. A change counts after two readings, within less than a second."""
_DISK_SECONDS = 10.0
_MOST_OCTETS = 256 * 1024
_MOST_PARTS = 100
"""Full stops in a line. The parser's time grows with the square of the parts of a key."""
_VERSION = re.compile("[0-9a-f]{8,64}")
_KEYS, _PIN_KEYS = frozenset(("accept", "pin")), frozenset(("version", "until"))


class PolicyUnusable(Exception):
    """The file cannot be read, or its content cannot be used. The text says why."""


@dataclass(frozen=True, slots=True)
class Content:
    """What the file is."""

    octets: bytes
    others_may_write: bool = False


class PublicationPolicy:
    """The policy in force."""

    def __init__(self, path: Path, on_change: Callable[[], None]) -> None:
        """``on_change`` is called after each change of ``current``."""
        self._path = path
        self.current = Policy()
        """The policy that counts: an empty one until the file was read."""
        self._on_change = on_change
        self._reading: asyncio.Future[Content] | None = None
        self._seen: Content | str | None = None
        """The last finding: a content, or the reason why there was none."""
        self._judged: Content | str | None = None
        """The finding that was acted upon last."""
        self.problem: str | None = None
        """Why the file as it is does not count; None where it does."""

    async def run(self) -> None:
        """Read the file for ever. Never returns."""
        while True:
            await self.read()
            await asyncio.sleep(READ_SECONDS)

    async def read(self, *, at_once: bool = False) -> None:
        """Read the file, and act if its content is new.

        Args:
            at_once: Act upon the first sight of a content, as at a start, where nothing is to be kept.
        """
        found = await self._read()
        if found != self._judged and (found == self._seen or at_once):
            await self._judge(found)
        self._seen = found

    async def _read(self) -> Content | str:
        # One thread at a time is in this, however long the disk hangs.
        if self._reading is None:
            try:
                self._reading = on_disk(lambda: read_file(self._path))
            except RuntimeError as fault:
                return f"no thread can be started: {fault}"
        reading = self._reading
        done, _ = await asyncio.wait((reading,), timeout=_DISK_SECONDS)
        if not done:
            return "the disk does not answer"
        self._reading = None
        error = reading.exception()
        if error is None:
            return reading.result()
        if not isinstance(error, PolicyUnusable):
            raise error
        return str(error)

    async def _judge(self, found: Content | str) -> None:
        try:
            if isinstance(found, str):
                raise PolicyUnusable(found)
            policy = await on_disk(lambda: parse(found.octets))  # a large one takes seconds
        except RuntimeError:  # no thread can be started: the next reading says so, or this content is found again
            return
        except PolicyUnusable as error:
            self._judged = found
            self.problem = f"{self._path}: {error}"
            log.error(
                "Publication policy not usable; the one before it stays",
                path=str(self._path),
                error=str(error),
                remedy="mend the file; docs/control.md shows its form",
            )
            return
        self._judged, self.problem = found, None
        if found.others_may_write:
            log.warning(
                "Every user may write the publication policy",
                path=str(self._path),
                remedy="take that right away (chmod o-w): the file decides what is served",
            )
        log.info(
            "Publication policy read",
            path=str(self._path),
            accept=list(policy.accept),
            pin=None if policy.pin is None else policy.pin.version,
            until=None if policy.pin is None else policy.pin.until_text,
        )
        self.current = policy
        self._on_change()


def read_file(path: Path) -> Content:
    """The content of the file. Blocks.

    Raises:
        PolicyUnusable: where it cannot be read, is no file or too large.
    """
    try:
        # By `open`, which closes what it cannot use: `fdopen` refuses a directory and leaves its descriptor open.
        with open(path, "rb", opener=_open) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise PolicyUnusable("it is not a regular file")
            octets = file.read(_MOST_OCTETS + 1)
    except (OSError, ValueError) as error:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise PolicyUnusable(f"it cannot be read: {text}") from None
    if len(octets) > _MOST_OCTETS:
        raise PolicyUnusable(f"it has more than {_MOST_OCTETS:,} octets")
    return Content(octets, bool(mode & stat.S_IWOTH))


def _open(path: str, flags: int) -> int:
    """Without waiting for the writer of a FIFO."""
    return os.open(path, flags | os.O_NOCTTY | os.O_NONBLOCK)


def parse(content: bytes) -> Policy:
    """The policy that ``content`` declares.

    Raises:
        PolicyUnusable: where it is not TOML, or not of our form. Nothing of it counts then.
    """
    for number, line in enumerate(content.splitlines(), 1):
        if line.count(b".") > _MOST_PARTS:
            raise PolicyUnusable(f"line {number} has more than {_MOST_PARTS} full stops")
    try:
        document = tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise PolicyUnusable("it is not UTF-8") from None
    except RecursionError:
        raise PolicyUnusable("it is nested too deep") from None
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise PolicyUnusable(f"it is not TOML: {error}") from None
    _refuse_unknown(document, _KEYS, "")
    accept = document.get("accept", [])
    if not isinstance(accept, list):
        raise PolicyUnusable("accept is not a list of hashes")
    pin = document.get("pin")
    if pin is not None and not isinstance(pin, dict):
        raise PolicyUnusable("pin is not a table: write [pin]")
    return Policy(tuple(_version(each, "accept") for each in accept), None if pin is None else _pin(pin))


def _pin(table: dict[str, Any]) -> Pin:
    _refuse_unknown(table, _PIN_KEYS, "pin.")
    if "version" not in table:
        raise PolicyUnusable("pin.version is missing")
    until = table.get("until")
    if until is not None and (not isinstance(until, datetime) or until.tzinfo is None):
        raise PolicyUnusable("pin.until is not a time with a time zone, such as 2026-12-01T00:00:00Z, without quotes")
    if until is not None and until.timestamp() > LATEST_SECONDS:  # by its time zone
        raise PolicyUnusable("pin.until is after the year 9999: leave it out for a pin without an end")
    return Pin(_version(table["version"], "pin.version"), None if until is None else until.timestamp(), "policy")


def _version(value: object, where: str) -> str:
    if not isinstance(value, str) or not _VERSION.fullmatch(value.lower()):
        raise PolicyUnusable(f"{where}: {str(value)[:80]!r} is not 8 to 64 hex digits of a version")
    return value.lower()


def _refuse_unknown(table: dict[str, Any], known: frozenset[str], prefix: str) -> None:
    """A misspelled key must not be ignored: the file would then seem to ask for nothing."""
    unknown = sorted(table.keys() - known)
    if unknown:
        names = ", ".join(
            f"{prefix}{name!r:.40}" if not name.isidentifier() else f"{prefix}{name:.40}" for name in unknown
        )
        raise PolicyUnusable(f"unknown: {names}; known are {', '.join(prefix + name for name in sorted(known))}")
