"""One door for every transport: authenticate, answer, count, and turn any failure into what the client may see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter_ns

from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.failure import CallFailed, Status
from definition_server.data_plane.services import DefinitionEngine
from definition_server.ipc.stats import METHODS, STATUSES, Slot
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

STATUS_INDEX = {status: STATUSES.index(status.http) for status in Status}
"""Where a status is counted in a stats slot."""

Metadata = Iterable[tuple[str, str | bytes]]
Handler = Callable[[bytes, Metadata], bytes]


class Endpoint:
    """The unary methods of `DefinitionEngine` behind authentication and counters."""

    def __init__(self, engine: DefinitionEngine, keys: KeyRing, slot: Slot) -> None:
        self.engine = engine
        self.keys = keys
        self.slot = slot
        self.handlers: dict[str, Handler] = {
            "GetCommand": self._guarded("GetCommand", engine.get_command),
            "SyncCatalog": self._guarded("SyncCatalog", engine.sync_catalog),
        }
        """Method name → what answers it. A handler raises `CallFailed` and nothing else."""

    def _guarded(self, method: str, answer: Callable[[bytes], bytes]) -> Handler:
        index = METHODS.index(method)
        slot, keys = self.slot, self.keys

        def handle(request: bytes, metadata: Metadata) -> bytes:
            start = perf_counter_ns()
            status = Status.INTERNAL
            try:
                keys.authenticate(metadata)
                answered = answer(request)
                status = Status.OK
                return answered
            except CallFailed as failure:
                status = failure.status
                raise
            except Exception as error:  # a bug of ours must cost one call, not tell its inside, and be seen
                log.exception("Unexpected failure in a call", method=method)
                raise CallFailed(Status.INTERNAL, "Internal error") from error
            finally:
                slot.count(index, STATUS_INDEX[status], perf_counter_ns() - start)

        return handle
