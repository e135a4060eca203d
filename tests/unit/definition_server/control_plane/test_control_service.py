"""The methods of the control socket: the calls that each method makes to stand-ins of the other parts, and its
answer."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.logs import captured_logs, logged
from tests.support.snapshots import opened, row

from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane import control_service
from definition_server.control_plane.control_service import ControlService
from definition_server.control_plane.history import HistoryEntry
from definition_server.control_plane.publications import InvalidRequest, PublicationError, UnknownVersion
from definition_server.control_plane.sync_state import ChangeCounts, Outcome, SyncState
from definition_server.observability.status import (
    CatalogStatus,
    FreshnessStatus,
    RequestStatus,
    RestartStatus,
    ServiceStatus,
    SyncStatus,
)
from definition_server.rpc import avap_control_pb2 as pb
from grpc_h2 import StatusCode

PUBLISHED_AT = 1_800_000_000.5


class Aborted(Exception):
    """The end of a call with a status and a text, as a transport ends it."""


class Context:
    async def abort(self, status: StatusCode, text: str) -> None:
        raise Aborted(status, text)


class Worker:
    """A worker that has generation 2."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.ready.set()
        self.draining = False
        self.generation = 2


class Master:
    """Stand-ins for the parts of a master, and a service that uses them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fault: PublicationError | None = None
        self.note: str | None = None
        self.problem: str | None = None
        self.outcome = Outcome.PUBLISHED
        self.state = SyncState(last_error="the last error")
        self.catalog: CatalogStatus | None = None
        self.seconds_to_next: float | None = 20.0
        self.worker = Worker()
        self.published: Snapshot | None = opened("if", "else", generation=2)
        self.accepted = opened("if", generation=3)
        self.exported = opened("if", "else")
        self.entries = [HistoryEntry(each * 32, 3, 1.0, 2.0) for each in ("ab", "cd")]
        publications = SimpleNamespace(
            accept=self._asked("accept"), pin=self._asked("pin"), unpin=self._asked("unpin"), history=self._history,
            diff=self._diff, export=self._export,
        )  # fmt: skip
        self.publisher = SimpleNamespace(published_at=PUBLISHED_AT, current=None)
        supervisor = SimpleNamespace(
            all_serve_since=PUBLISHED_AT + 1, slots=[SimpleNamespace(worker=self.worker), SimpleNamespace(worker=None)],
            roll=self._roll,
        )  # fmt: skip
        self.serve(self.published)
        service = ControlService(
            cast(Any, publications), cast(Any, self.publisher), cast(Any, supervisor), self.state, status=self._status,
            notices=lambda: ["a notice"], sync=self._sync, seconds_to_next=lambda: self.seconds_to_next,
            held_commands=lambda: [cast(Any, SimpleNamespace(name="if", reason="bad", since=1.0, hash_served=None,
                                                             hash_refused=None))],
        )  # fmt: skip
        self.service = service
        self.handlers = service.handlers()

    def serve(self, snapshot: Snapshot | None) -> None:
        self.publisher.current = None if snapshot is None else SimpleNamespace(snapshot=snapshot)

    def _asked(self, name: str) -> Any:
        async def act(*arguments: Any) -> str | None:
            self.calls.append((name, *arguments))
            if self.fault is not None:
                raise self.fault
            if name == "accept":
                self.worker.generation = self.accepted.generation
                self.serve(self.accepted)
            return self.note

        return act

    async def _history(self) -> list[HistoryEntry]:
        return self.entries

    async def _diff(self, old: str, new: str) -> Any:
        changes = SimpleNamespace(added=["a"], removed=["b", "c"], changed=["d"])
        return old * 2, new * 2, changes

    async def _export(self, version: str | None) -> Snapshot:
        self.calls.append(("export", version))
        return self.exported

    async def _sync(self) -> Outcome:
        self.calls.append("sync")
        return self.outcome

    async def _roll(self, replaced: Any) -> str | None:
        for done in (1, 2):
            await asyncio.sleep(0)
            replaced(done)
        for _ in range(9):  # the last worker is reported, and the service waits for the next one, before the roll ends
            await asyncio.sleep(0)
        return self.problem

    def _status(self) -> ServiceStatus:
        sync = SyncStatus({}, None, None, None, None, 0.0, None, None, None, 0, {}, {})
        return ServiceStatus("1", 1.0, True, False, self.catalog, sync, (), RequestStatus({}, (), {}, {}),
                             freshness=FreshnessStatus(True, None), restart=RestartStatus(True, "stored"))  # fmt: skip

    async def call(self, method: str, request: Any) -> Any:
        handler: Any = self.handlers[method]
        if handler.response_streaming:
            return [each async for each in handler.unary_stream(request, Context())]
        return await handler.unary_unary(request, Context())


@pytest.fixture
async def master() -> Master:
    return Master()


async def test_the_status_has_the_times_of_the_publication_and_the_notices_of_the_master(master: Master) -> None:
    master.catalog = CatalogStatus(2, "ab" * 32, 2, 10, 1.0)
    status = await master.call("GetStatus", pb.GetStatusRequest())
    assert status.served.published_at.ToNanoseconds() == PUBLISHED_AT * 1e9
    assert status.served.all_workers_at.ToNanoseconds() == (PUBLISHED_AT + 1) * 1e9
    assert list(status.notices) == ["a notice"]
    assert status.sync.next_attempt.ToNanoseconds() / 1e9 == pytest.approx(time.time() + 20, abs=5)
    assert [held.name for held in status.held_commands] == ["if"]
    assert [version.version_hash for version in status.history] == ["ab" * 32, "cd" * 32]
    master.catalog, master.seconds_to_next = None, None
    status = await master.call("GetStatus", pb.GetStatusRequest())
    assert not status.HasField("served")
    assert not status.sync.HasField("next_attempt"), "a cycle runs"


async def test_the_history_shows_the_served_version_and_the_changes_of_each(master: Master) -> None:
    assert master.published is not None
    served = master.published.version_hash
    master.entries.append(HistoryEntry(served, 2, 1.0, 2.0))
    master.state.changes[served] = ChangeCounts(4, 5, 6)
    history = await master.call("ListHistory", pb.ListHistoryRequest())
    assert [(version.served, version.changes.changed) for version in history.versions] == [
        (False, 0), (False, 0), (True, 6),
    ]  # fmt: skip
    master.serve(None)
    history = await master.call("ListHistory", pb.ListHistoryRequest())
    assert not any(version.served for version in history.versions)


async def test_a_difference_names_both_versions_and_the_commands(master: Master) -> None:
    found = await master.call("Diff", pb.DiffRequest(old="ab", new="cd"))
    assert (found.old, found.new) == ("abab", "cdcd")
    assert (list(found.added), list(found.removed), list(found.changed)) == (["a"], ["b", "c"], ["d"])


async def test_a_command_is_answered_with_the_version_that_every_worker_serves_and_its_time(master: Master) -> None:
    before = time.time()
    master.note = "a note"
    served = await master.call("Unpin", pb.UnpinRequest())
    assert master.calls == [("unpin",)]
    assert (served.generation, served.definitions, served.unchanged, served.note) == (2, 2, True, "a note")
    assert served.published_at.ToNanoseconds() == PUBLISHED_AT * 1e9
    assert before - 1 <= served.all_workers_at.ToNanoseconds() / 1e9 <= time.time()
    assert 0 <= served.seconds < 5


async def test_an_accepted_catalogue_is_served_at_once_or_when_the_pin_ends(master: Master) -> None:
    accepted = master.accepted.version_hash
    served = await master.call("Accept", pb.AcceptRequest(version_hash=accepted[:8]))
    assert master.calls == [("accept", accepted[:8])]
    assert (served.version_hash, served.unchanged, served.note) == (accepted, False, "")
    served = await master.call("Accept", pb.AcceptRequest(version_hash="00"))
    assert served.note == "the accepted catalogue is served when the pin ends"


async def test_serving_the_first_catalogue_counts_as_a_change(master: Master) -> None:
    master.serve(None)
    master.accepted = opened("if", generation=1)
    served = await master.call("Accept", pb.AcceptRequest(version_hash=master.accepted.version_hash))
    assert (served.generation, served.unchanged) == (1, False)


async def test_a_pin_has_an_end_if_the_request_gives_one(master: Master) -> None:
    request = pb.PinRequest(version_hash="ab")
    await master.call("Pin", request)
    request.until.FromNanoseconds(1_800_000_000_500_000_000)
    await master.call("Pin", request)
    assert master.calls == [("pin", "ab", None), ("pin", "ab", 1_800_000_000.5)]


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (UnknownVersion("no such version"), StatusCode.NOT_FOUND),
        (InvalidRequest("not so"), StatusCode.INVALID_ARGUMENT),
        (PublicationError("not now"), StatusCode.FAILED_PRECONDITION),
    ],
)
async def test_a_command_that_cannot_be_carried_out_ends_with_a_status_and_a_text(
    master: Master, fault: PublicationError, status: StatusCode
) -> None:
    master.fault = fault
    with pytest.raises(Aborted) as ended:
        await master.call("Unpin", pb.UnpinRequest())
    assert ended.value.args == (status, str(fault))


async def test_a_command_before_the_first_publication_is_noted_and_the_answer_states_it(master: Master) -> None:
    master.serve(None)
    with pytest.raises(Aborted) as ended:
        await master.call("Unpin", pb.UnpinRequest())
    assert ended.value.args[0] is StatusCode.FAILED_PRECONDITION
    assert "nothing is served yet" in ended.value.args[1]


async def test_a_worker_that_does_not_serve_the_catalogue_delays_an_answer_by_ten_seconds(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    polls: list[float] = []

    async def sleep(seconds: float) -> None:
        polls.append(seconds)
        clock[0] += 1.0

    monkeypatch.setattr(control_service, "time", SimpleNamespace(monotonic=lambda: clock[0], time=lambda: 5.0))
    monkeypatch.setattr(asyncio, "sleep", sleep)
    master.worker.generation = 1
    served = await master.call("Unpin", pb.UnpinRequest())
    assert not served.HasField("all_workers_at")
    assert clock[0] == 111.0, "the worker is checked again after ten seconds, and not later"
    assert set(polls) == {0.002}
    assert served.seconds == 11.0


@pytest.mark.parametrize(("state", "arrived"), [("ready", True), ("draining", False), ("starting", False)])
async def test_an_answer_waits_for_every_ready_worker_that_does_not_drain_and_for_one_at_least(
    master: Master, state: str, arrived: bool
) -> None:
    master.worker.draining = state == "draining"
    if state == "starting":
        master.worker.ready.clear()
    assert master.service._all_have(2) is arrived
    assert not master.service._all_have(3)


async def test_a_sync_answers_its_outcome_and_the_version_served_afterwards(master: Master) -> None:
    with captured_logs() as lines:
        result = await master.call("Sync", pb.SyncRequest())
    assert logged(lines, "Sync requested", log_level="info")
    assert master.calls == ["sync"]
    assert (result.outcome, result.error, result.served.generation) == ("published", "the last error", 2)
    assert 0 <= result.seconds < 5
    assert result.served.note.startswith("commands held at an earlier version: 1")
    master.serve(None)
    assert not (await master.call("Sync", pb.SyncRequest())).HasField("served")


@pytest.mark.parametrize("problem", [None, "worker 2: it did not become READY"])
async def test_a_roll_reports_each_worker_and_the_reason_for_its_end(master: Master, problem: str | None) -> None:
    master.problem = problem
    seen: list[tuple[int, int]] = []
    handler: Any = master.handlers["Roll"]

    async def roll() -> None:
        async for each in handler.unary_stream(pb.RollRequest(), Context()):
            seen.append((each.replaced, each.workers))  # noqa: PERF401 - what came before an end counts, too

    if problem is None:
        await roll()
    else:
        with pytest.raises(Aborted) as ended:
            await roll()
        assert ended.value.args == (StatusCode.FAILED_PRECONDITION, problem)
    assert seen == [(0, 2), (1, 2), (2, 2)]
    await asyncio.sleep(0)
    assert not master.service._rolling, "a roll that has ended is forgotten"
    assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing waits for another worker"


async def test_a_roll_continues_when_its_client_leaves(master: Master) -> None:
    answers = master.service._roll(pb.RollRequest())
    await anext(answers)
    (rolling,) = master.service._rolling
    await answers.aclose()
    await asyncio.wait((rolling,), timeout=5)
    assert rolling.result() is None


@pytest.mark.parametrize(("version", "asked"), [("", None), ("ab", "ab")])
async def test_an_export_is_sent_in_messages_of_a_quarter_of_a_mebibyte(
    master: Master, version: str, asked: str | None
) -> None:
    master.exported = opened(*(row(f"c{number}", "x" * 100_000, id=number) for number in range(7)))
    messages = await master.call("Export", pb.ExportRequest(version_hash=version))
    assert master.calls == [("export", asked)]
    assert [len(message.commands) for message in messages] == [3, 3, 1]
    assert (messages[0].version_hash, messages[0].total_count) == (master.exported.version_hash, 7)
    assert (messages[1].version_hash, messages[1].total_count) == ("", 0)
    assert b"".join(command for message in messages for command in message.commands) == b"".join(
        bytes(command) for command in master.exported.messages()
    )


def test_messages_are_serialized_and_read(master: Master) -> None:
    handler: Any = master.handlers["Accept"]
    assert handler.request_deserializer(pb.AcceptRequest(version_hash="ab").SerializeToString()).version_hash == "ab"
    assert handler.response_serializer(pb.Served(generation=5)) == pb.Served(generation=5).SerializeToString()
