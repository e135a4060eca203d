"""The methods of ``avap.control.v1.Control``: the operator's queries and commands.

Each method checks the request, calls the part of the master that does the work, and answers with the version that the
workers serve afterwards. A request that cannot be fulfilled ends with a status and a text for the operator.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from definition_server.control_plane.control_status import (
    HeldCommand,
    held_message,
    served_message,
    set_time,
    shortfalls,
    status_message,
    version_message,
)
from definition_server.control_plane.publications import (
    InvalidRequest,
    PublicationError,
    Publications,
    UnknownVersion,
)
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.supervisor import Supervisor
from definition_server.control_plane.sync_state import Outcome, SyncState
from definition_server.observability.logs import get_logger
from definition_server.observability.status import ServiceStatus
from definition_server.rpc import avap_control_pb2 as pb
from grpc_h2 import MethodHandler, StatusCode

log = get_logger(__name__)

_PROPAGATION_SECONDS = 10.0
"""Seconds for which an answer waits for the workers: a worker that does not take a snapshot must not delay the operator
for ever.
"""
_POLL_SECONDS = 0.002
_EXPORT_OCTETS = 256 * 1024
"""The size of one message of an export."""


_STATUS: tuple[tuple[type[PublicationError], StatusCode], ...] = (
    (UnknownVersion, StatusCode.NOT_FOUND),
    (InvalidRequest, StatusCode.INVALID_ARGUMENT),
    (PublicationError, StatusCode.FAILED_PRECONDITION),
)


class ControlService:
    """The methods, bound to the parts of a master."""

    def __init__(
        self,
        publications: Publications,
        publisher: Publisher,
        supervisor: Supervisor,
        sync_state: SyncState,
        *,
        status: Callable[[], ServiceStatus],
        notices: Callable[[], Sequence[str]],
        sync: Callable[[], Awaitable[Outcome]],
        seconds_to_next: Callable[[], float | None] = lambda: None,
        held_commands: Callable[[], Sequence[HeldCommand]] = tuple,
    ) -> None:
        """
        Args:
            publications: Publishes, holds and pins.
            publisher: Has the current publication.
            supervisor: Knows the workers.
            sync_state: The result of the cycles.
            status: Reads the status of the service.
            notices: Returns sentences for the operator that the status does not contain.
            sync: Runs a cycle that reads the whole table.
            seconds_to_next: The time until the next cycle; None while one runs.
            held_commands: The commands of which an earlier version is served.
        """
        self._publications = publications
        self._publisher = publisher
        self._supervisor = supervisor
        self._sync_state = sync_state
        self._status = status
        self._notices = notices
        self._sync = sync
        self._seconds_to_next = seconds_to_next
        self._held_commands = held_commands
        self._rolling: set[asyncio.Task[str | None]] = set()

    def handlers(self) -> Mapping[str, MethodHandler]:
        """Method → handler."""
        return {
            "GetStatus": _unary(self._get_status, pb.GetStatusRequest),
            "ListHistory": _unary(self._list_history, pb.ListHistoryRequest),
            "Diff": _unary(self._diff, pb.DiffRequest),
            "Accept": _unary(self._accept, pb.AcceptRequest),
            "Pin": _unary(self._pin, pb.PinRequest),
            "Unpin": _unary(self._unpin, pb.UnpinRequest),
            "Sync": _unary(self._sync_now, pb.SyncRequest),
            "Roll": _streaming(self._roll, pb.RollRequest),
            "Export": _streaming(self._export, pb.ExportRequest),
        }

    async def _get_status(self, _: pb.GetStatusRequest) -> pb.Status:
        message = status_message(self._status(), self._sync_state)
        if message.HasField("served"):
            set_time(message.served.published_at, self._publisher.published_at)
            set_time(message.served.all_workers_at, self._supervisor.all_serve_since)
        message.notices.extend(self._notices())
        seconds = self._seconds_to_next()
        set_time(message.sync.next_attempt, None if seconds is None else time.time() + seconds)
        message.held_commands.extend(map(held_message, self._held_commands()))
        message.history.extend(await self._versions())
        return message

    async def _list_history(self, _: pb.ListHistoryRequest) -> pb.History:
        return pb.History(versions=await self._versions())

    async def _versions(self) -> list[pb.Version]:
        current = self._publisher.current
        served = None if current is None else current.snapshot.version_hash
        entries = await self._publications.history()
        changes = self._sync_state.changes
        return [
            version_message(entry, changes.get(entry.version_hash), served=entry.version_hash == served)
            for entry in entries
        ]

    async def _diff(self, request: pb.DiffRequest) -> pb.Difference:
        old, new, changes = await self._publications.diff(request.old, request.new)
        return pb.Difference(old=old, new=new, added=changes.added, removed=changes.removed, changed=changes.changed)

    async def _accept(self, request: pb.AcceptRequest) -> pb.Served:
        message = await self._served_after(self._publications.accept(request.version_hash))
        if not message.version_hash.startswith(request.version_hash):
            message.note = "the accepted catalogue is served when the pin ends"
        return message

    async def _pin(self, request: pb.PinRequest) -> pb.Served:
        until = request.until.ToNanoseconds() / 1e9 if request.HasField("until") else None
        return await self._served_after(self._publications.pin(request.version_hash, until))

    async def _unpin(self, _: pb.UnpinRequest) -> pb.Served:
        return await self._served_after(self._publications.unpin())

    async def _sync_now(self, _: pb.SyncRequest) -> pb.SyncResult:
        started = time.monotonic()
        log.info("Sync requested")
        outcome = await self._sync()
        seconds = time.monotonic() - started
        message = pb.SyncResult(outcome=outcome.value, error=self._sync_state.last_error or "", seconds=seconds)
        if self._publisher.current is not None:
            message.served.CopyFrom(await self._served_by_all())
            message.served.note = shortfalls(self._sync_state, len(self._held_commands()))
        return message

    async def _served_after(self, action: Awaitable[str | None] | Awaitable[None]) -> pb.Served:
        """The version that is served after ``action``, once every worker has it."""
        started = time.monotonic()
        before = self._generation()
        note = await action
        if self._publisher.current is None:
            raise PublicationError("the request is noted, but nothing is served yet: see `definition-server status`")
        message = await self._served_by_all()
        message.seconds = time.monotonic() - started
        message.unchanged = self._generation() == before
        message.note = note or ""
        return message

    def _generation(self) -> int:
        current = self._publisher.current
        return 0 if current is None else current.snapshot.generation

    async def _served_by_all(self) -> pb.Served:
        """The current publication, and the time at which the last worker received it."""
        deadline = time.monotonic() + _PROPAGATION_SECONDS
        while not (arrived := self._all_have(self._generation())):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_SECONDS)
        current = self._publisher.current
        assert current is not None
        message = served_message(current.snapshot)
        set_time(message.published_at, self._publisher.published_at)
        if arrived:
            set_time(message.all_workers_at, time.time())
        return message

    def _all_have(self, generation: int) -> bool:
        workers = [slot.worker for slot in self._supervisor.slots if slot.worker is not None]
        serving = [worker for worker in workers if worker.ready.is_set() and not worker.draining]
        return bool(serving) and all(worker.generation >= generation for worker in serving)

    async def _roll(self, _: pb.RollRequest) -> AsyncIterator[pb.RollProgress]:
        """A roll continues when its client disconnects, because a partial roll would be worse."""
        workers = len(self._supervisor.slots)
        replaced: asyncio.Queue[int] = asyncio.Queue()
        rolling = asyncio.create_task(self._supervisor.roll(replaced.put_nowait))
        self._rolling.add(rolling)
        rolling.add_done_callback(self._rolling.discard)
        yield pb.RollProgress(replaced=0, workers=workers)
        while not rolling.done() or not replaced.empty():
            coming = asyncio.create_task(replaced.get())
            try:
                await asyncio.wait((coming, rolling), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not coming.done():
                    coming.cancel()
            if coming.done() and not coming.cancelled():
                yield pb.RollProgress(replaced=coming.result(), workers=workers)
        problem = await rolling
        if problem is not None:
            raise PublicationError(problem)

    async def _export(self, request: pb.ExportRequest) -> AsyncIterator[pb.ExportedRows]:
        snapshot = await self._publications.export(request.version_hash or None)
        message = pb.ExportedRows(version_hash=snapshot.version_hash, total_count=snapshot.count)
        octets = 0
        for command in snapshot.messages():
            message.commands.append(bytes(command))
            octets += len(command)
            if octets >= _EXPORT_OCTETS:
                yield message
                message, octets = pb.ExportedRows(), 0
        yield message


def _unary(method: Callable[[Any], Awaitable[Message]], request: type[Message]) -> MethodHandler:
    async def handle(message: Any, context: Any) -> Message:
        try:
            return await method(message)
        except PublicationError as error:
            await context.abort(_status_of(error), str(error))
            raise

    return MethodHandler.unary(handle, request.FromString, _serialized)


def _streaming(method: Callable[[Any], AsyncIterator[Message]], request: type[Message]) -> MethodHandler:
    async def handle(message: Any, context: Any) -> AsyncIterator[Message]:
        try:
            async for answer in method(message):
                yield answer
        except PublicationError as error:
            await context.abort(_status_of(error), str(error))

    return MethodHandler.streaming(handle, request.FromString, _serialized)


def _status_of(error: PublicationError) -> StatusCode:
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
