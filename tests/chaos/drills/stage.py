"""The stage of a drill: database, table, proxy, server and the load."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.drills.load import DrillLoad, Job
from tests.chaos.drills.model import Usage
from tests.chaos.drills.reader import Reader, new_reader
from tests.chaos.drills.rows import VersionedTable
from tests.chaos.drills.usage import usage
from tests.support.providers import DatabaseServer, create_database, drop_database
from tests.support.proxy import Proxy
from tests.support.server import KEY, ServerProcess

SETTINGS = {
    "WORKERS": "2",
    "SYNC_INTERVAL_SECONDS": "0.5",
    "CONNECT_TIMEOUT_SECONDS": "1",
    "STATEMENT_TIMEOUT_SECONDS": "1",
    "HEARTBEAT_TIMEOUT_SECONDS": "2",
}
"""Settings of a drill's server that differ from a test's (`tests.support.server.FAST`)."""

BROKEN = Path(__file__).parents[1] / "broken"
"""Directory of the ``sitecustomize`` that gives a server a deliberate defect."""

REFUSED_SECONDS = 1.5
"""On grpcio, time within which a client has another connection: every worker has a listening socket of its own, and the
kernel may put a client's next connection into the accept queue of a dying worker, and then reset it. The client tries
again after 1 s ± 20 % (gRPC's connection backoff), and until then calls that do not wait fail at once.
"""

_CLIENT_MARGIN_SECONDS = 1.0
"""Time after ``STATEMENT_TIMEOUT_SECONDS`` at which the server gives up a wait."""
_MOST_NAMES = 2000
_LARGEST_ANSWER = 4 << 20
"""The default receive limit of clients. A larger catalogue is requested by name only: the drill is about the
database.
"""
_OCTETS_PER_CALL = 13_000
"""Octets of whole catalogues for an average call: 4 MB/s at 300 calls per second, which Python clients can handle."""
_WORK_SECONDS = 1.5
_WORK_SHARE = 1.5
"""Time for reading, building, publishing, and the load's next call on every connection: these seconds, or this multiple
of a cycle without a fault, whichever is longer.
"""

_numbers = itertools.count()


@dataclass
class Stage:
    """Everything that a fault may use. For a target that the drill did not start, most of it is None."""

    target: str
    """HOST:PORT that clients call."""
    transport: str = "?"
    provider: str = "?"
    """Provider of the database: ``embedded``, ``container``, ``external``."""
    key: str = KEY
    server: ServerProcess | None = None
    database: DatabaseServer | None = None
    table: VersionedTable | None = None
    proxy: Proxy | None = None
    """The proxy between the server and its database."""
    directory: Path | None = None
    """Directory for files of this stage. ``url`` is the server's DATABASE_URL_FILE."""
    settings: dict[str, str] = field(default_factory=dict)
    """Settings of the server that differ from `tests.support.server.FAST`."""
    job: Job | None = None
    """The load to offer. If None, `Stage.default_job` is offered."""
    load: DrillLoad | None = None
    """Set while a drill runs."""
    wounds: list[tuple[float, float]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Broken promises that the fault itself detected, each as a sentence: `judge.judge` reports them too."""
    reader: Reader | None = None
    """The role of the server. If None, it is the owner of the table."""
    first_line: int = 0
    """Number of the server's first log line since the fault began."""
    cycle_took: float = 0.0
    """Seconds from a commit until every connection gets the new answer, in a cycle without a fault."""
    pids: list[int] = field(default_factory=list)
    """Process ids of a server that this process did not start but may inspect."""

    @contextmanager
    def wound(self) -> Iterator[None]:
        """The block harms calls in flight while it lasts. Calls that a client sends on a lost connection before it
        notices the loss are also treated as in flight (`judge`).
        """
        began = time.monotonic()
        try:
            yield
        finally:
            after = 0.0 if self.transport == "native" else REFUSED_SECONDS
            self.wounds.append((began, time.monotonic() + after))

    def default_job(self) -> Job:
        """The steady load of a drill."""
        job = Job(self.target, self.key)
        if self.table is not None:
            job.rows, job.size = self.table.rows, self.table.size
            whole = self.table.rows * self.table.size
            job.sync_every = max(job.sync_every, whole // _OCTETS_PER_CALL) if whole <= _LARGEST_ANSWER else 0
            job.names = self.table.names[:: max(1, self.table.rows // _MOST_NAMES)]
        return job

    def usage(self) -> Usage | None:
        """Resource usage of the server's processes; None if this process may not inspect them."""
        if self.server is not None:
            return usage([self.server.pid, *self.server.worker_pids()])
        return usage(self.pids) if self.pids else None

    @property
    def gone(self) -> bool:
        """Whether the server has ended."""
        try:
            return self.server is not None and self.server.wait_exit(0) is not None
        except subprocess.TimeoutExpired:
            return False

    def logged(self, message: str, *needles: str) -> int:
        """Number of log lines of the server since the fault began with that message and one of ``needles`` in
        ``error``; without needles, any error.
        """
        if self.server is None:
            return 0
        lines = self.server.logged(message, after=self.first_line)
        return sum(not needles or any(each in line.get("error", "") for each in needles) for line in lines)

    def cycles(self, outcome: str | None = None) -> int | None:
        """The number of sync cycles up to now (with that outcome); None if it is unknown."""
        if self.server is None:
            return None
        counted: dict[str, int] = self.server.statusz()["sync"]["cycles"]
        return sum(counted.values()) if outcome is None else counted[outcome]

    @property
    def cycle_seconds(self) -> float:
        """The longest time until fresh rows are served: the cycle under way may first reach its time limit; the wait
        for the next cycle and its work follow.
        """
        settings = SETTINGS | self.settings
        give_up = max(
            float(settings["CONNECT_TIMEOUT_SECONDS"]),
            float(settings["STATEMENT_TIMEOUT_SECONDS"]) + _CLIENT_MARGIN_SECONDS,
        )
        work = max(_WORK_SECONDS, _WORK_SHARE * self.cycle_took)
        return give_up + float(settings["SYNC_INTERVAL_SECONDS"]) + work


@contextmanager
def open_stage(
    database: DatabaseServer,
    directory: Path,
    *,
    transport: str,
    rows: int = 100,
    size: int = 200,
    reader: bool = False,
    broken: str = "",
    **settings: str,
) -> Iterator[Stage]:
    """A server behind a proxy on a new database of ``database``, serving ``rows`` rows.

    Args: database: is not closed here. directory: an existing directory for files. reader: the server uses a role with
    SELECT only, by password (needs a superuser). broken: name of a variant with a deliberate defect
    (`tests/chaos/broken`). settings: added to `SETTINGS`.
    """
    name = f"drill_{os.getpid()}_{next(_numbers)}"
    with ExitStack() as stack:
        url = create_database(database.url, name)
        stack.callback(_drop, database, name)
        table = VersionedTable(url, rows=rows, size=size)
        proxy = stack.enter_context(Proxy(url))
        role = stack.enter_context(new_reader(url, f"{name}_reader")) if reader else None
        url_file = directory / "url"
        url_file.write_text(role.url(proxy.url) if role else proxy.url)
        chosen = SETTINGS | {"TRANSPORT": transport} | settings
        if broken:
            chosen |= {"PYTHONPATH": str(BROKEN), "PYTHON_DRILL_BROKEN": broken}
        # A secret comes from a file, so that a rotation can be rehearsed; then the variable itself must be unset.
        server = ServerProcess("", **{"DATABASE_URL_FILE": str(url_file)} | chosen)
        stack.enter_context(server)
        server.wait_ready()
        stage = Stage(
            target=f"127.0.0.1:{server.port}",
            transport=transport,
            provider=database.name,
            server=server,
            database=database,
            table=table,
            proxy=proxy,
            directory=directory,
            reader=role,
            settings=chosen,
        )
        try:
            yield stage
        finally:
            if stage.server is not None:  # a fault that restarts the server replaces it here
                stage.server.end()


def _drop(database: DatabaseServer, name: str) -> None:
    """Drop the stage's database; if a failed drill left its PostgreSQL dead, the owner closes it."""
    import psycopg

    with suppress(psycopg.OperationalError):
        drop_database(database.url, name)
