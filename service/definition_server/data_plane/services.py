"""The RPCs of ``avap.DefinitionEngine``, implemented once for every transport: from request octets to answer octets."""

from __future__ import annotations

from definition_server.catalog.snapshot import Snapshot
from definition_server.catalog.wire import NAME, WireError
from definition_server.data_plane.failure import CallFailed, Status
from definition_server.data_plane.requests import check_empty, text_of

SERVICE = "avap.DefinitionEngine"

MAX_REQUEST = 4096
"""The most octets of a request, both compressed and uncompressed, for every method and transport. Each request to this
server is empty or a name (of a service, of a symbol, or of a command, with at most 100 characters). With gRPC's default
of 4 MiB, a peer without a key could make a worker hold 4 MiB on each of its streams."""

VERSION_METADATA = "avap-version"
"""The name of the metadata that names the catalogue of an answer."""
_VERSION_DIGITS = 16

Version = tuple[tuple[str, str], ...]

_NAME_TAG = NAME << 3 | 2
_LONGEST_NAME_SHOWN = 200
"""The most characters of a requested name that the error message repeats. The table's column holds 100 characters, so
no catalogue has a longer name; and trailers have a limit of 8 KiB."""


class DefinitionEngine:
    """Answers from ``snapshot``. A serving process replaces it only by `Swap.commit` (see ``swap.py``)."""

    def __init__(self, *, names_version: bool = True) -> None:
        """``names_version``: whether the metadata of answers name the catalogue."""
        self.names_version = names_version
        self.snapshot: Snapshot | None = None
        """The served snapshot; None until the first one is assigned."""
        self._version: Version = ()
        self._version_of = b""
        """The hash from which ``_version`` was made. A reference to the snapshot would keep the snapshot in memory."""

    @property
    def version(self) -> Version:
        """The metadata of every answer from ``snapshot``; empty if answers do not name the catalogue, or there is no
        snapshot."""
        snapshot = self.snapshot
        if snapshot is None or not self.names_version:
            return ()
        version_hash = snapshot.footer.version_hash
        if version_hash is not self._version_of:
            self._version = ((VERSION_METADATA, version_hash.hex()[:_VERSION_DIGITS]),)
            self._version_of = version_hash
        return self._version

    def get_command(self, request: bytes) -> bytes:
        """``CommandRequest`` → ``CommandResponse``, both serialized.

        Raises:
            CallFailed: INVALID_ARGUMENT, NOT_FOUND, UNAVAILABLE.
        """
        snapshot = self._current()
        name = _requested_name(request)
        answer = snapshot.answer(name)
        if answer is None:
            shown = name.decode()
            if len(shown) > _LONGEST_NAME_SHOWN:
                shown = shown[:_LONGEST_NAME_SHOWN] + "…"
            raise CallFailed(Status.NOT_FOUND, f"Command '{shown}' not found")
        return answer

    def sync_catalog(self, request: bytes) -> memoryview:
        """``Empty`` → ``CatalogResponse``, both serialized.

        The answer is not copied: it is the snapshot's own memory, which stays mapped for as long as the view is
        referenced.

        Raises:
            CallFailed: INVALID_ARGUMENT, UNAVAILABLE.
        """
        snapshot = self._current()
        if request:
            try:
                check_empty(request)
            except WireError as error:
                raise _invalid("avap.Empty") from error
        return snapshot.body

    def _current(self) -> Snapshot:
        snapshot = self.snapshot
        if snapshot is None:
            raise CallFailed(Status.UNAVAILABLE, "The catalogue is not loaded yet")
        return snapshot


def _requested_name(request: bytes) -> bytes:
    """The name in a serialized ``CommandRequest``, as UTF-8.

    Every client library writes a name below 128 octets as tag, length and octets. Other forms are read field by field,
    which also validates the encoding.
    """
    if len(request) > 2 and request[0] == _NAME_TAG and request[1] == len(request) - 2 < 128:
        name = request[2:]
        if name.isascii():
            return name
    try:
        return text_of(request)
    except WireError as error:
        raise _invalid("avap.CommandRequest") from error


def _invalid(message: str) -> CallFailed:
    return CallFailed(Status.INVALID_ARGUMENT, f"The request is not a valid {message}")
