"""``PUBLICATION_POLICY``: a TOML file that names the accepted catalogues and the pinned one, for all replicas that have
the file.

    accept = ["3f9a0c12"]                 # hashes, or beginnings of at least 8 digits
    [pin]
    version = "3f9a0c12…"
    until = 2026-12-01T00:00:00Z          # without it, until the file has no pin

The whole file is read several times a second, and its content is compared. So a symbolic link that is replaced
(Kubernetes does so) is noticed, and times of modification do not matter. A new content takes effect when two readings
in a row have found it, so that an editor that empties the file before writing to it does not remove a pin. If the
content cannot be used, or the file is gone, this is logged once, and the previous policy remains in effect.
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
"""Seconds between two readings. A change takes effect after two readings, which is less than a second."""
_DISK_SECONDS = 10.0
_MOST_OCTETS = 256 * 1024
_MOST_PARTS = 100
"""The most full stops in a line. The parser's time grows with the square of the number of parts of a key."""
_VERSION = re.compile("[0-9a-f]{8,64}")
_KEYS, _PIN_KEYS = frozenset(("accept", "pin")), frozenset(("version", "until"))


class PolicyUnusable(Exception):
    """The file cannot be read, or its content cannot be used. The message gives the reason."""


@dataclass(frozen=True, slots=True)
class Content:
    """The file's octets, and whether other users may write the file."""

    octets: bytes
    others_may_write: bool = False


class PublicationPolicy:
    """Reads the policy file, and holds the policy that is in effect."""

    def __init__(self, path: Path, on_change: Callable[[], None]) -> None:
        """``on_change`` is called after each change of ``current``."""
        self._path = path
        self.current = Policy()
        """The policy in effect. It is empty until the file was read."""
        self._on_change = on_change
        self._reading: asyncio.Future[Content] | None = None
        self._seen: Content | str | None = None
        """The result of the last reading: the content, or the reason why there was none."""
        self._judged: Content | str | None = None
        """The result that was put into effect or refused last."""
        self.problem: str | None = None
        """The reason why the present file is not in effect; None if it is in effect."""

    async def run(self) -> None:
        """Read the file again and again. Never returns."""
        while True:
            await self.read()
            await asyncio.sleep(READ_SECONDS)

    async def read(self, *, at_once: bool = False) -> None:
        """Read the file, and act if its content is new.

        Args:
            at_once: Whether one reading of a new content suffices. It does at the start, when there is no earlier
                policy to keep.
        """
        found = await self._read()
        if found != self._judged and (found == self._seen or at_once):
            await self._judge(found)
        self._seen = found

    async def _read(self) -> Content | str:
        # At most one thread reads the file, even if the disk hangs.
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
            policy = await on_disk(lambda: parse(found.octets))  # parsing a large file takes seconds
        except RuntimeError:  # no thread can be started: the next reading reports that or tries again
            return
        except PolicyUnusable as error:
            self._judged = found
            self.problem = f"{self._path}: {error}"
            log.error(
                "Publication policy not usable; the previous one stays",
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
        PolicyUnusable: if it cannot be read, is not a file or is too large.
    """
    try:
        # By `open`, which closes a descriptor that it cannot use. `fdopen` refuses a directory, but leaves the
        # descriptor open.
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
    """Open ``path`` without waiting for the writer of a FIFO."""
    return os.open(path, flags | os.O_NOCTTY | os.O_NONBLOCK)


def parse(content: bytes) -> Policy:
    """The policy that ``content`` declares.

    Raises:
        PolicyUnusable: if it is not TOML, or not of our form. Then no part of it takes effect.
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
    if until is not None and until.timestamp() > LATEST_SECONDS:  # in UTC the time is after that year
        raise PolicyUnusable("pin.until is after the year 9999: leave it out for a pin without an end")
    return Pin(_version(table["version"], "pin.version"), None if until is None else until.timestamp(), "policy")


def _version(value: object, where: str) -> str:
    if not isinstance(value, str) or not _VERSION.fullmatch(value.lower()):
        raise PolicyUnusable(f"{where}: {str(value)[:80]!r} is not 8 to 64 hex digits of a version")
    return value.lower()


def _refuse_unknown(table: dict[str, Any], known: frozenset[str], prefix: str) -> None:
    """Refuse unknown keys: if a misspelled key were ignored, the wish behind it would be lost without notice."""
    unknown = sorted(table.keys() - known)
    if unknown:
        names = ", ".join(
            f"{prefix}{name!r:.40}" if not name.isidentifier() else f"{prefix}{name:.40}" for name in unknown
        )
        raise PolicyUnusable(f"unknown: {names}; known keys: {', '.join(prefix + name for name in sorted(known))}")
