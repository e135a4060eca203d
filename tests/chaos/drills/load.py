"""Starts and reads the load of a drill, which runs in a separate process (`load_process`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.chaos.drills.model import Failure, LoadReport, SetReport, Sighting
from tests.support.polling import until

_ROOT = Path(__file__).parents[3]
END_SECONDS = 60.0


@dataclass(slots=True)
class Job:
    """The load to offer, and its target."""

    target: str
    """HOST:PORT."""
    key: str
    names: list[str] = field(default_factory=list)
    """Commands to request; empty: those that ``SyncCatalog`` names at the start."""
    rate: float = 300.0
    """Calls per second: half without a retry, half with it."""
    connections: int = 16
    """Connections in each of the two sets."""
    sync_every: int = 20
    """About one call in so many is ``SyncCatalog``; 0 if no call is."""
    deadline_seconds: float = 10.0
    connect_seconds: float = 20.0
    ca_file: str = ""
    """PEM file of the authority: TLS. Empty: cleartext."""
    rows: int = 0
    """Rows of the `rows.VersionedTable` behind the target; 0 if the target may have any catalogue
    (`answers.Checker`).
    """
    size: int = 0
    """Octets of filling in each of those rows."""
    most_failures: int = 5000
    """Number of failures of each set that are reported one by one. Further failures cannot be judged."""


class LoadFailed(Exception):
    """The load could not start, or its process died; the message is for the reader."""


class DrillLoad:
    """A running load, as a context manager; afterwards ``report`` is complete."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.report = LoadReport()
        self._progress: dict[str, Any] = {}
        self._error: str | None = None
        self._other: list[str] = []
        self._result: dict[str, Any] | None = None
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.drills.load_process"],
            cwd=_ROOT,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,))
        self._reader.start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(self.job)) + "\n")
            self._process.stdin.flush()
            self.wait_steady()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()
        if self._result is not None:
            self.report = read_report(self._result)
        elif exc_info[0] is None:
            raise LoadFailed(self._told())

    def _end(self) -> None:
        """Stop the load, wait for its result, and end its process."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        assert self._reader is not None
        try:
            process.stdin.close()
            process.wait(END_SECONDS)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._error = self._error or f"the load did not end within {END_SECONDS:g} s; {self._stand()}"
            process.kill()
            process.wait()
        self._reader.join(10)
        process.stdout.close()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                self._other.append(line)
                continue
            self._progress = said.get("progress", self._progress)
            self._result = said.get("result", self._result)
            self._error = said.get("error", self._error)

    def _told(self) -> str:
        return self._error or "the load's process died:\n" + "".join(self._other[-20:])

    def _alive(self) -> None:
        assert self._process is not None
        if self._error or self._process.poll() is not None:
            raise LoadFailed(self._told())

    # -- results up to now -------------------------------------------------------------------------------------

    def _so_far(self, what: str) -> int:
        self._alive()
        return int(self._progress.get(what, 0))

    @property
    def offered(self) -> int:
        """Calls so far."""
        return self._so_far("offered")

    @property
    def answered(self) -> int:
        """Calls answered so far."""
        return self._so_far("answered")

    @property
    def failed(self) -> int:
        """Calls failed so far."""
        return self._so_far("failed")

    def everywhere(self, version: str) -> float | None:
        """The time (monotonic clock) at which every connection had seen ``version``; None if some have not seen it
        yet."""
        self._alive()
        found: float | None = self._progress.get("everywhere", {}).get(version)
        return found

    @property
    def version(self) -> str | None:
        """The version that every connection saw last; None while these versions differ."""
        self._alive()
        found: str | None = self._progress.get("now_everywhere")
        return found

    # -- waiting -----------------------------------------------------------------------------------------------

    def wait_steady(self, seconds: float = 30) -> None:
        """Wait until every connection has been answered."""
        wanted = 2 * self.job.connections
        if self.job.rows or self.job.sync_every:
            until(lambda: self._so_far("seen_on") == wanted, self._stand, seconds=seconds)
        else:
            until(lambda: self.answered >= wanted, self._stand, seconds=seconds)

    def keep(self, seconds: float) -> None:
        """Continue the load for ``seconds``, measured by the calls that were offered."""
        goal = self.offered + int(seconds * self.job.rate)
        until(lambda: self.offered >= goal, self._stand, seconds=3 * seconds + 30)

    def wait_everywhere(self, version: str, seconds: float) -> float:
        """Wait until every connection sees ``version``. Returns the time (monotonic clock) at which the last one
        did.
        """
        until(
            lambda: self.everywhere(version) is not None, lambda: f"version {version}: {self._stand()}", seconds=seconds
        )
        found = self.everywhere(version)
        assert found is not None
        return found

    def _stand(self) -> str:
        return f"the load so far: {self._progress}"


def _environment() -> dict[str, str]:
    """Our environment without the variables for coverage, which would slow the load down."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return kept | {"GRPC_VERBOSITY": "ERROR"}


def read_report(result: dict[str, Any]) -> LoadReport:
    """The report that the load's process sent as JSON."""

    def read_set(found: dict[str, Any]) -> SetReport:
        return SetReport(**found | {"failures": [Failure(**each) for each in found["failures"]]})

    return LoadReport(
        **result
        | {
            "plain": read_set(result["plain"]),
            "retrying": read_set(result["retrying"]),
            "versions": {tag: Sighting(**each) for tag, each in result["versions"].items()},
        }
    )
