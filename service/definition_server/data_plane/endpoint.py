"""The RPCs in the form that every transport calls: authenticate, answer, and reduce any failure to the text that the
client may see.

Only this module logs bugs and hides their text (`Method`). The grpcio transport calls it once per request, through
`Endpoint.handlers`, which also count. The native transport calls it only for requests whose answer is not remembered,
and counts whole batches of answers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter_ns
from typing import Protocol

from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.failure import CallFailed, Status
from definition_server.data_plane.services import SERVICE, DefinitionEngine
from definition_server.ipc.stats import METHODS, STATUSES
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

STATUS_INDEX = [STATUSES.index(Status.INTERNAL.http)] * (max(Status) + 1)
"""Status → its counter in a stats slot. A list, because an `IntEnum` takes long to hash."""
for _status in Status:
    STATUS_INDEX[_status] = STATUSES.index(_status.http)

Metadata = Iterable[tuple[str, str | bytes]]
Handler = Callable[[bytes, Metadata], bytes]
Answering = Callable[[DefinitionEngine, bytes], bytes | memoryview]


class Method:
    """One RPC of `DefinitionEngine`. Its methods raise only `CallFailed`."""

    def __init__(self, name: str, answer: Answering, keys: KeyRing) -> None:
        self.name = name
        self.path = f"/{SERVICE}/{name}"
        self.index = METHODS.index(name)
        """The index of the method's counters in a stats slot."""
        self._answer = answer
        self._keys = keys

    def authenticate(self, metadata: Metadata) -> None:
        """Return if the call's metadata hold a known key."""
        try:
            self._keys.authenticate(metadata)
        except CallFailed:
            raise
        except Exception as error:
            raise self._hidden(error) from error

    def answer(self, engine: DefinitionEngine, request: bytes) -> bytes | memoryview:
        """The serialized answer to a serialized request, from the snapshot that ``engine`` serves."""
        try:
            return self._answer(engine, request)
        except CallFailed:
            raise
        except Exception as error:
            raise self._hidden(error) from error

    def copied_answer(self, engine: DefinitionEngine, request: bytes) -> bytes:
        """A copy of the result of `answer`, for a transport that cannot use a view of the snapshot's memory."""
        answer = self.answer(engine, request)
        try:
            return bytes(answer)
        except MemoryError as error:
            raise self._hidden(error) from error

    def _hidden(self, error: Exception) -> CallFailed:
        """Log ``error``, a bug of ours, and return the failure for the client, which does not reveal the error."""
        log.error("Unexpected failure in a call", method=self.name, exc_info=error)
        return CallFailed(Status.INTERNAL, "Internal error")


class CallCounter(Protocol):
    """An object that counts calls, such as `ipc.stats.Slot`."""

    def count(self, method: int, status: int, elapsed_ns: int) -> None:
        """See `Slot.count`."""

    def count_many(self, method: int, status: int, number: int, elapsed_ns: int) -> None:
        """See `Slot.count_many`."""


class Endpoint:
    """The unary methods of `DefinitionEngine` behind authentication, and the counters of one worker."""

    def __init__(self, engine: DefinitionEngine, keys: KeyRing, slot: CallCounter) -> None:
        self.engine = engine
        self.keys = keys
        self.slot = slot
        answers = type(engine)
        self.methods = (
            Method("GetCommand", answers.get_command, keys),
            Method("SyncCatalog", answers.sync_catalog, keys),
        )
        self.handlers: dict[str, Handler] = {method.name: self._counted(method) for method in self.methods}
        """Method name → (request, metadata) → answer, counted. A handler raises only `CallFailed`."""

    def _counted(self, method: Method) -> Handler:
        engine, slot = self.engine, self.slot

        def handle(request: bytes, metadata: Metadata) -> bytes:
            start = perf_counter_ns()
            status = Status.INTERNAL
            try:
                method.authenticate(metadata)
                answer = method.copied_answer(engine, request)
                status = Status.OK
                return answer
            except CallFailed as failure:
                status = failure.status
                raise
            finally:
                slot.count(method.index, STATUS_INDEX[status], perf_counter_ns() - start)

        return handle
