"""Faults for a target that others use. No fault outlasts the drill: each ends with its own session or process.

`faults_client.GENTLE_FAULTS` need no confirmation; faults of the database, and clients in full strength, do. The
target's operator makes faults of processes and machines, and the drill only observes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
from tests.chaos.drills.model import Fault
from tests.chaos.drills.stage import Stage
from tests.chaos.faults_client import FULL_FAULTS, GENTLE_FAULTS
from tests.chaos.target import Sessions, session

POLL_SECONDS = 0.1
LOCK_SECONDS = 10.0
CONNECT_SECONDS = 5.0
CUTS_SECONDS = 3.0


class CannotHarm(Exception):
    """The fault cannot be made; the message is for the reader."""


class TargetDatabase:
    """The database of a target, and its faults."""

    def __init__(self, url: str, interval_seconds: float) -> None:
        """``interval_seconds``: the target's ``SYNC_INTERVAL_SECONDS``."""
        self._url = url
        self._patience = 2 * interval_seconds + 15
        self.looked_after: float | None = None
        """Seconds from the end of the last fault until a server had read the table again; None if none has."""

    def faults(self) -> tuple[Fault, ...]:
        """The faults, in order."""
        return (
            Fault("target-table-locked", "table locked ACCESS EXCLUSIVE", "database", self._locked),
            Fault("target-sessions-cut", "the server's sessions cut", "database", self._cut),
        )

    @contextmanager
    def _locked(self, stage: Stage) -> Iterator[None]:
        """Lock the table against reads and writes until the block ends. The block starts when a server waits for the
        lock.
        """
        with session(self._url) as watching:
            sessions = Sessions(watching)
            with session(self._url) as locking:
                try:
                    locking.execute(f"SET lock_timeout = '{LOCK_SECONDS:.0f}s'")
                    with locking.transaction():
                        locking.execute("LOCK TABLE obex_dapl_functions IN ACCESS EXCLUSIVE MODE")
                        if self._wait_for_look(sessions.wait_for_lock) is None:
                            text = f"no server has tried to read the locked table within {self._patience:.0f} s"
                            raise CannotHarm(f"{text}; is --interval the target's SYNC_INTERVAL_SECONDS?")
                        yield
                except psycopg.errors.InsufficientPrivilege as error:
                    raise CannotHarm(f"the role of --database may not lock the table: {error}") from None
                except psycopg.errors.LockNotAvailable:
                    text = f"another session holds a lock on the table for more than {LOCK_SECONDS:.0f} s"
                    raise CannotHarm(text) from None
            self._see_look(stage, sessions)

    @contextmanager
    def _cut(self, stage: Stage) -> Iterator[None]:
        """End the servers' sessions, again and again."""
        with session(self._url) as watching:
            sessions = Sessions(watching)
            if not sessions.number():
                raise CannotHarm("no definition server has a session in the database of --database")
            try:
                until = time.monotonic() + CUTS_SECONDS
                while time.monotonic() < until:
                    sessions.end()
                    time.sleep(POLL_SECONDS)
            except psycopg.errors.InsufficientPrivilege as error:
                raise CannotHarm(f"the role of --database may not end the server's sessions: {error}") from None
            yield
            self._see_look(stage, sessions)

    def _wait_for_look(self, what: Callable[[], bool]) -> float | None:
        """Wait for ``what``, the effect of a sync cycle of the server. Returns the seconds; None if the effect did not
        occur."""
        began = time.monotonic()
        while not what():
            if time.monotonic() - began > self._patience:
                return None
            time.sleep(POLL_SECONDS)
        return time.monotonic() - began

    def _see_look(self, stage: Stage, sessions: Sessions) -> None:
        """Measure the time from the end of the fault until a server reads the table again."""
        now = sessions.now()
        self.looked_after = self._wait_for_look(lambda: sessions.has_looked_since(now))
        if self.looked_after is None:
            stage.broken.append(f"no server has read the table within {self._patience:.0f} s of the fault's end")


@contextmanager
def nothing(stage: Stage) -> Iterator[None]:
    """Makes no fault; the operator makes one during this time."""
    yield


OBSERVE = Fault("observe", "none (observed only)", "client", nothing, harms=False)

WITHOUT_DATABASE = (OBSERVE, *GENTLE_FAULTS, *FULL_FAULTS)
"""Faults for any target."""
