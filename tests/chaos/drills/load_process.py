"""The load of a drill: ``python -m tests.chaos.drills.load_process``, started by `tests.chaos.drills.load`.

Open loop: calls are sent on a schedule, whether or not earlier calls have been answered. Calls alternate between two
sets of connections, one without any retry and one with the retry policy of the README; every answer is checked.

The process reads a `load.Job` as one line of JSON and prints ``{"progress": …}`` several times a second. When standard
input ends, it waits for the calls under way and prints ``{"result": …}``. An error before the first call is printed as
``{"error": …}``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
from tests.chaos.drills.answers import Checker, WrongAnswer
from tests.chaos.drills.load import Job
from tests.chaos.drills.model import Failure, LoadReport, SetReport, Sighting
from tests.support.client import RETRYING, UNLIMITED
from tests.support.open_loop import open_loop

from definition_server.rpc import avap_pb2

PROGRESS_SECONDS = 0.1
LATE_SECONDS = 0.1
MOST_TOLD = 5000
_GET, _SYNC = "/avap.DefinitionEngine/GetCommand", "/avap.DefinitionEngine/SyncCatalog"


@dataclass(slots=True)
class Connection:
    """One channel and the last version that it saw."""

    number: int
    channel: grpc.aio.Channel
    retrying: bool
    version: str | None = None
    answered: float = 0.0
    """When the newest of the calls that were answered was sent."""
    calls: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Counts:
    """The results of the calls of one set of connections."""

    offered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def report(self) -> SetReport:
        """The counts and latencies as JSON."""
        ordered = sorted(self.latencies)

        def at(share: float) -> float:
            return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 2) if ordered else 0.0

        failed = dict(self.failed)
        return SetReport(self.offered, len(ordered), failed, self.failures, at(1), at(0.5), at(0.99))


class Load:
    """The load while it runs."""

    def __init__(self, job: Job, connections: list[Connection], names: list[str]) -> None:
        self._job = job
        self._connections = connections
        self._names = names
        self._requests = {name: avap_pb2.CommandRequest(name=name).SerializeToString() for name in names}
        # The numbers are coprime, so that every connection gets calls.
        self._sync_every = job.sync_every
        while self._sync_every and math.gcd(self._sync_every, len(connections)) > 1:
            self._sync_every += 1
        self._metadata = (("x-avap-auth", job.key),)
        self._checker = Checker(job.rows, job.size)
        self._counts = {False: Counts(), True: Counts()}
        self._pending: set[asyncio.Task[None]] = set()
        self._wrong: list[str] = []
        self._wrong_count = 0
        self._went_back: list[str] = []
        self._late = 0
        self._sightings: dict[str, Sighting] = {}
        self._newest_everywhere: tuple[int, float] | None = None
        self._started = time.monotonic()

    async def run(self, stopped: asyncio.Event) -> None:
        """Offer calls until ``stopped``, and then wait for the calls under way."""
        self._started = time.monotonic()
        async for due in open_loop(self._job.rate, stopped.is_set):
            self._late += due.behind >= LATE_SECONDS
            self._offer(due.number, due.instant)
        await asyncio.gather(*self._pending)

    def _offer(self, number: int, due: float) -> None:
        connection = self._connections[number % len(self._connections)]
        self._counts[connection.retrying].offered += 1
        whole = self._sync_every and number % self._sync_every == 0
        name = "" if whole else self._names[number % len(self._names)]
        task = asyncio.create_task(self._call(connection, name, due))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _call(self, connection: Connection, name: str, due: float) -> None:
        """``GetCommand(name)``, or ``SyncCatalog`` without a name."""
        counts = self._counts[connection.retrying]
        method, request = (_GET, self._requests[name]) if name else (_SYNC, b"")
        sent, answered = time.monotonic(), connection.answered
        try:
            answer = await connection.calls[method](
                request, metadata=self._metadata, timeout=self._job.deadline_seconds
            )
        except grpc.aio.AioRpcError as error:
            code, details = error.code().name, (error.details() or "")[:200]
            self._failed(
                counts,
                Failure(method.rpartition("/")[2], connection.number, code, details, sent, time.monotonic(), answered),
            )
            return
        now = time.monotonic()
        connection.answered = max(connection.answered, sent)
        counts.latencies.append(now - due)
        try:
            version = self._checker.definition(name, answer) if name else self._checker.catalogue(answer)
        except WrongAnswer as error:
            self._wrong_count += 1
            if len(self._wrong) < MOST_TOLD:
                self._wrong.append(f"{method.rpartition('/')[2]} on connection {connection.number}: {error}")
            return
        if version is not None:
            self._seen(connection, version, sent, now)

    def _failed(self, counts: Counts, failure: Failure) -> None:
        counts.failed[failure.code] += 1
        if len(counts.failures) < self._job.most_failures:
            counts.failures.append(failure)

    def _seen(self, connection: Connection, version: str, sent: float, now: float) -> None:
        """Note that an answer to a call sent at ``sent`` was of ``version``."""
        sighting = self._sightings.setdefault(version, Sighting(now, now, 0))
        sighting.last = now
        sighting.answers += 1
        if self._newest_everywhere is not None and version.isdecimal() and self._job.rows:
            newest, since = self._newest_everywhere
            if int(version) < newest and sent > since and len(self._went_back) < MOST_TOLD:
                self._went_back.append(f"version {version} on connection {connection.number} after {newest} everywhere")
        if connection.version == version:
            return
        connection.version = version
        if sighting.everywhere is None and all(each.version == version for each in self._connections):
            sighting.everywhere = now
            if self._job.rows:
                self._newest_everywhere = (int(version), now)

    def progress(self) -> dict[str, Any]:
        """The progress so far."""
        counts_of_sets = self._counts.values()
        return {
            "offered": sum(counts.offered for counts in counts_of_sets),
            "answered": sum(len(counts.latencies) for counts in counts_of_sets),
            "failed": sum(counts.failed.total() for counts in counts_of_sets),
            "wrong": self._wrong_count,
            "seen_on": sum(each.version is not None for each in self._connections),
            "everywhere": {tag: each.everywhere for tag, each in self._sightings.items() if each.everywhere},
            "now_everywhere": _common({each.version for each in self._connections}),
        }

    def report(self) -> LoadReport:
        """The result."""
        return LoadReport(
            plain=self._counts[False].report(),
            retrying=self._counts[True].report(),
            wrong=self._wrong,
            wrong_count=self._wrong_count,
            went_back=self._went_back,
            versions=self._sightings,
            seconds=time.monotonic() - self._started,
            late=self._late,
            rate=self._job.rate,
        )


def _common(versions: set[str | None]) -> str | None:
    """The version that all connections saw last; None if the versions differ."""
    return next(iter(versions)) if len(versions) == 1 else None


def say(**what: Any) -> None:
    """Print one line of JSON."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def connect(job: Job) -> list[Connection]:
    """Open the connections, alternately without and with a retry policy."""
    found = []
    for number in range(2 * job.connections):
        retrying = number % 2 == 1
        options = [*UNLIMITED, *(RETRYING if retrying else ()), ("grpc.use_local_subchannel_pool", 1)]
        if job.ca_file:
            credentials = grpc.ssl_channel_credentials(Path(job.ca_file).read_bytes())
            channel = grpc.aio.secure_channel(job.target, credentials, options=options)
        else:
            channel = grpc.aio.insecure_channel(job.target, options=options)
        calls: dict[str, Any] = {method: channel.unary_unary(method) for method in (_GET, _SYNC)}
        found.append(Connection(number, channel, retrying, calls=calls))
    return found


async def known_names(job: Job, connection: Connection) -> list[str]:
    """The names of the job, or those of the served catalogue."""
    if job.names:
        return job.names
    answer = await connection.calls[_SYNC](b"", metadata=(("x-avap-auth", job.key),), timeout=60)
    return [command.name for command in avap_pb2.CatalogResponse.FromString(answer).commands]


async def until_all_connected(connections: list[Connection], seconds: float) -> None:
    """Wait until all are connected. Raises `TimeoutError` if a connection fails."""
    async with asyncio.timeout(seconds):
        await asyncio.gather(*(each.channel.channel_ready() for each in connections))


async def tell_progress(load: Load) -> None:
    """Print the progress at intervals. Never returns."""
    while True:
        say(progress=load.progress())
        await asyncio.sleep(PROGRESS_SECONDS)


async def main() -> int:
    """Run the job. Returns the exit code: 1 if it could not start."""
    job = Job(**json.loads(sys.stdin.readline()))
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stopped.set)
    connections = connect(job)
    try:
        await until_all_connected(connections, job.connect_seconds)
        names = await known_names(job, connections[0])
    except TimeoutError:
        say(error=f"not all of {len(connections)} connections to {job.target} came up in {job.connect_seconds:g} s")
        return 1
    except grpc.aio.AioRpcError as error:
        say(error=f"SyncCatalog at {job.target}: {error.code().name}: {error.details()}")
        return 1
    if not names:
        say(error=f"the catalogue at {job.target} is empty: there is no command to ask for")
        return 1
    load = Load(job, connections, names)
    gc.freeze()  # pauses of the generator must not be attributed to the server
    teller = asyncio.create_task(tell_progress(load))
    await load.run(stopped)
    teller.cancel()
    say(result=asdict(load.report()))
    for each in connections:
        await each.channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
