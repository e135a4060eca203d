"""The messages to a worker, the effects of its messages, and when its process is killed. The test acts as the
worker."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.logs import LogLines, logged
from tests.support.loop import turns
from tests.support.snapshots import published

from definition_server.control_plane.publisher import Publication
from definition_server.control_plane.worker_process import WorkerProcess, _MessageBudget
from definition_server.ipc import messages
from definition_server.ipc.channel import Channel
from definition_server.ipc.tls_files import TlsFiles
from definition_server.jail.confinement import Extent

DIGEST = "ab" * 32
KEYS, FRESH, FIRST = messages.Keys((DIGEST,)), messages.Freshness(True), messages.Certificate(1)


class Process:
    """A process that runs until it is killed."""

    pid = 4711

    def __init__(self) -> None:
        self.returncode: int | None = None
        self.ended = asyncio.Event()
        self.kills = 0

    async def wait(self) -> int:
        await self.ended.wait()
        return -9

    def kill(self) -> None:
        self.kills += 1


class Page:
    """A stand-in for the stats page of a worker, with a descriptor of the test."""

    def __init__(self) -> None:
        self.descriptor, self._other = os.pipe()
        self.error: OSError | None = None
        self.seals = 0

    def seal(self) -> None:
        if self.error is not None:
            raise self.error
        self.seals += 1

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._other)


class Started:
    """The master's object for a worker, and the worker's end of the socket."""

    def __init__(self, *, by_path: bool) -> None:
        ours, theirs = Channel.pair()
        self.end = Channel.of_worker(theirs)
        self.process, self.page = Process(), Page()
        self.stats = SimpleNamespace(page=self.page, fault=None, read=lambda: None)
        self.calls: list[Any] = []
        self.worker = WorkerProcess(
            3, cast(Any, self.process), ours, cast(Any, self.stats), messages.Certificate(0), loads_by_path=by_path,
            on_mapped=lambda: self.calls.append("mapped"), on_keys_used=self.calls.append,
            on_calls_sampled=lambda *each: self.calls.append(each),
            on_ready=lambda worker: self.calls.append(("ready", worker.generation)),
        )  # fmt: skip

    def reconcile(self, **given: Any) -> list[messages.Message]:
        """The messages that the worker has received."""
        parts: dict[str, Any] = {"keys": KEYS, "freshness": FRESH, "certificate": messages.Certificate(0), "tls": None,
                                 "publication": None, "peers": {}}  # fmt: skip
        self.worker.reconcile(**parts | given)
        return self.taken()

    def taken(self) -> list[messages.Message]:
        found = []
        while (received := self.end.receive()) is not None:
            found.append(received[0])
            for descriptor in received[1]:
                os.close(descriptor)
        return found

    async def says(self, *said: messages.Message) -> None:
        for each in said:
            self.end.send(each)
            await turns()

    async def close(self) -> None:
        self.process.ended.set()
        await asyncio.wait((self.worker.ended,))
        self.end.close()
        self.page.close()


@pytest.fixture
async def started() -> AsyncIterator[Started]:
    made = Started(by_path=True)
    yield made
    await made.close()


@pytest.fixture
def publication() -> Any:
    made = published("if", generation=2)
    yield made
    os.close(made.descriptor)


async def test_keys_and_freshness_are_sent_once_and_again_when_they_change(started: Started) -> None:
    assert started.reconcile() == [KEYS, FRESH]
    assert started.reconcile() == []
    assert started.reconcile(freshness=messages.Freshness(False)) == [messages.Freshness(False)]
    assert started.reconcile(keys=messages.Keys(()), freshness=messages.Freshness(False)) == [messages.Keys(())]


async def test_a_certificate_is_sent_once_to_a_worker_that_is_ready(started: Started) -> None:
    started.reconcile()
    with TlsFiles.seal(b"certificate", b"key") as tls:
        assert started.reconcile(certificate=FIRST, tls=tls) == [], "it is not READY yet"
        await started.says(messages.Mapped(), messages.Ready(0, "full"))
        assert started.reconcile(certificate=FIRST) == [], "without TLS"
        assert started.reconcile(certificate=FIRST, tls=tls) == [FIRST]
        assert started.reconcile(certificate=FIRST, tls=tls) == []
        assert not started.worker.outdated


@pytest.mark.parametrize("by_path", [True, False])
async def test_a_worker_that_opens_no_file_any_more_is_outdated_if_its_transport_loads_by_path(
    by_path: bool,
) -> None:
    started = Started(by_path=by_path)
    started.reconcile()
    await started.says(messages.Mapped(), messages.Ready(0, "seccomp"))
    assert started.worker.jail is Extent.SECCOMP
    with TlsFiles.seal(b"certificate", b"key") as tls:
        assert started.reconcile(certificate=FIRST, tls=tls) == ([] if by_path else [FIRST])
    assert started.worker.outdated is by_path
    await started.close()


async def test_a_publication_is_sent_once_and_again_after_ten_seconds_if_the_worker_does_not_serve_it(
    started: Started, publication: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
    started.worker.reconcile(KEYS, FRESH, messages.Certificate(0), None, None, {})
    started.taken()
    assert not started.worker.knows_a_catalogue
    announced = [messages.Publish(2, publication.snapshot.version_hash)]
    assert started.reconcile(publication=publication) == announced
    assert started.worker.knows_a_catalogue
    now[0] += 100
    assert started.reconcile(publication=publication) == [], "it is not READY yet"
    started.worker.ready.set()
    now[0] = 100.0
    late = 0.0
    while not (sent := started.reconcile(publication=publication)):
        late += 0.25
        now[0] += 0.25
    assert sent == announced
    assert late == 10.25, "more than ten seconds"
    now[0] += 100
    started.worker.generation = 2
    assert started.reconcile(publication=publication) == []


async def test_pages_of_other_workers_are_sent_and_their_removal_is_announced(started: Started) -> None:
    started.reconcile()
    other = cast(Any, SimpleNamespace(stats=SimpleNamespace(page=SimpleNamespace(descriptor=started.page.descriptor))))
    peers = {4711: started.worker, 5: other}
    assert started.reconcile(peers=peers) == [messages.Peer(5)], "not the page of the worker itself"
    assert started.reconcile(peers=peers) == []
    assert started.reconcile(peers={4711: started.worker}) == [messages.PeerGone(5)]
    assert started.reconcile(peers={4711: started.worker}) == []
    assert started.reconcile(peers=peers) == [messages.Peer(5)]


async def test_messages_of_a_worker_reach_the_master(started: Started, publication: Publication) -> None:
    sampled = messages.CallsSampled((0,), (0,), (5000,), (1000,))
    started.reconcile(publication=publication)
    await started.says(messages.Mapped(), messages.Ready(0, "full"), messages.Ready(2, "full"),
                       messages.KeysUsed((DIGEST,)), sampled)  # fmt: skip
    assert started.calls == ["mapped", ("ready", 0), ("ready", 2), (DIGEST,), (3, sampled)]
    assert (started.page.seals, started.process.kills) == (1, 0)
    assert started.worker.jail is Extent.FULL


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([messages.Ready(0)], "Ready is out of order"),
        ([messages.KeysUsed(())], "KeysUsed is out of order"),
        ([messages.Mapped(), messages.Mapped()], "Mapped is out of order"),
        ([messages.Mapped(), messages.Ready(1)], "it reports READY with generation 1, which was not sent to it"),
        ([messages.Mapped(), messages.CallsSampled((99,), (0,), (5,), (1,))], "calls were sampled that cannot be"),
        ([messages.CallsSampled((0,), (0,), (5000,), (1000,))], "CallsSampled is out of order"),
    ],
    ids=["ready first", "keys first", "mapped twice", "ready with a future one", "impossible calls", "calls first"],
)
async def test_a_worker_that_sends_an_impossible_message_is_killed_and_not_read_any_more(
    started: Started, said: list[messages.Message], error: str, logs: LogLines
) -> None:
    await started.says(*said, messages.Mapped(), messages.Ready(0))
    message = "Worker violates the control protocol; killed"
    assert logged(logs, message, worker=3, worker_pid=4711, error=error, log_level="error")
    assert (len(logged(logs, message)), started.process.kills) == (1, 1)
    assert not started.worker.ready.is_set()


async def test_a_page_that_cannot_be_sealed_ends_its_worker(started: Started, logs: LogLines) -> None:
    started.page.error = OSError(16, "Device or resource busy")
    await started.says(messages.Mapped())
    assert logs[0]["error"] == "its stats page cannot be sealed: Device or resource busy"
    assert not started.worker.mapped
    assert started.calls == []


async def test_a_worker_that_has_closed_its_socket_is_a_problem_after_five_seconds_and_once(started: Started) -> None:
    started.end.close()
    await turns()
    now = started.worker._deaf_since
    assert now is not None
    assert started.worker.problem(now + 5.0) is None
    started.worker.draining = True
    assert started.worker.problem(now + 100) is None, "it ends"
    started.worker.draining = False
    assert started.worker.problem(now + 5.1) == "it has closed its control socket"
    assert started.worker.problem(now + 200) is None
    started.worker.reconcile(KEYS, FRESH, FIRST, None, None, {})
    started.worker.drain(messages.Drain(False, 0.0, 1.0))
    assert started.process.kills == 0


@pytest.mark.parametrize("how", ["closes", "violates", "ends"])
async def test_the_socket_of_a_worker_that_sends_no_more_messages_is_not_watched(started: Started, how: str) -> None:
    """A closed end stays readable, so watching it would keep the event loop busy all the time."""
    loop, descriptor = asyncio.get_running_loop(), started.worker._channel.fileno()
    if how == "closes":
        started.end.close()
    elif how == "violates":
        started.end.send(messages.Ready(0))
    else:
        started.process.ended.set()
        await asyncio.wait((started.worker.ended,))
    await turns()
    assert not loop.remove_reader(descriptor)


async def test_a_page_with_a_fault_is_a_problem_once(started: Started) -> None:
    now = asyncio.get_running_loop().time()
    started.stats.fault = "it leaps"
    assert started.worker.problem(now) == "its stats page is not plausible: it leaps"
    assert started.worker.problem(now) is None


async def test_a_process_that_has_ended_is_not_killed(started: Started) -> None:
    started.worker.kill()
    started.process.returncode = 0
    started.worker.kill()
    assert started.process.kills == 1


async def test_a_worker_is_killed_if_the_order_to_drain_cannot_be_sent(started: Started) -> None:
    while started.worker._channel.send(KEYS):
        pass
    started.worker.drain(messages.Drain(False, 0.0, 1.0))
    assert started.worker.draining
    assert started.process.kills == 1


def test_a_worker_may_send_a_thousand_messages_at_once_and_fifty_a_second() -> None:
    budget = _MessageBudget(100.0)
    assert [budget.take(100.0) for _ in range(1001)] == [True] * 1000 + [False]
    budget = _MessageBudget(100.0)
    taken = sum(budget.take(100.0) for _ in range(1000))
    assert (taken, [budget.take(101.0) for _ in range(51)]) == (1000, [True] * 50 + [False])
    budget = _MessageBudget(100.0)
    assert [budget.take(500.0) for _ in range(1001)] == [True] * 1000 + [False], (
        "a pause allows no more than a thousand"
    )
