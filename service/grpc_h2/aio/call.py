"""One call, as its handler sees it: grpc.aio's ``ServicerContext``, backed by a stream.

The connection's events arrive by `message_received`, `half_closed`, `writable` and `peer_cancelled`; the handler's task
waits for them in `receive` and `send`. A call can be ended by its handler (return, `abort`), by its deadline, by the
client, or by a server that stops. The first of these decides the status; later ones have no effect, because the stream
is closed by then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple, NoReturn

from grpc_h2.aio.protocol import Http2Protocol
from grpc_h2.connection.connection import Connection
from grpc_h2.connection.stream import Stream
from grpc_h2.rpc.faults import CallFault, UnreadableMessage
from grpc_h2.rpc.messages import compress_gzip
from grpc_h2.rpc.responses import metadata_fields
from grpc_h2.rpc.status import StatusCode
from grpc_h2.wire.errors import ErrorCode, Http2Error

_GZIP = 2
"""``grpc.Compression.Gzip``. With the other values (none, deflate) messages are sent uncompressed."""
_FOREVER = 10_000_000.0
"""Seconds beyond which a deadline needs no timer (99999999H are 11,000 years)."""

Serializer = Callable[[Any], bytes]
Deserializer = Callable[[bytes], Any]


class AbortError(Http2Error):
    """Raised by `ServicerContext.abort` to end the handler. This is not a failure."""


class Metadatum(NamedTuple):
    """An entry of metadata. The values of keys that end in ``-bin`` are bytes."""

    key: str
    value: str | bytes


class _Eof:
    """The result of `ServicerContext.read` after the last message, unless the server was given another object."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "<EOF>"


EOF: Final = _Eof()


class ServicerContext:
    """The context of one call, to be used in the loop's thread. Other threads use `handlers.SyncServicerContext`."""

    __slots__ = (
        "__weakref__",
        "_aborted",
        "_callbacks",
        "_code",
        "_compression",
        "_details",
        "_ended_early",
        "_eof",
        "_expires",
        "_finished",
        "_half_closed",
        "_inbox",
        "_loop",
        "_plain_next",
        "_protocol",
        "_reader",
        "_stream",
        "_timer",
        "_trailing",
        "_writer",
        "deserializer",
        "serializer",
        "task",
    )

    def __init__(
        self, protocol: Http2Protocol, stream: Stream, loop: asyncio.AbstractEventLoop, eof: Any, compression: int
    ) -> None:
        self._protocol = protocol
        self._stream = stream
        self._loop = loop
        self._eof = eof
        self._compression = compression
        self._plain_next = False
        self._inbox: deque[bytes] = deque()
        self._half_closed = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._code: Any = None
        self._details = ""
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()
        self._aborted = False
        self._finished = False
        self._callbacks: list[Callable[[Any], Any]] | None = None
        self._ended_early = False
        self.task: asyncio.Task[None] | None = None
        self.serializer: Serializer | None = None
        self.deserializer: Deserializer | None = None
        timeout = None if stream.request is None else stream.request.timeout
        self._expires: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            self._expires = loop.time() + timeout
            if timeout < _FOREVER:
                self._timer = loop.call_at(self._expires, self._expire)

    @property
    def _connection(self) -> Connection:
        """The connection of the call, after its clock has been set to the present instant: timers that the handler
        starts begin now."""
        connection = self._protocol.connection
        connection.advance(self._loop.time())
        return connection

    # -- events of the connection ---------------------------------------------------------------------------------

    def message_received(self, message: bytes) -> None:
        """A message of the client has arrived."""
        if self._finished:
            self._connection.consumed(self._stream, len(message))
            return
        self._inbox.append(message)
        _wake(self._reader)

    def half_closed(self) -> None:
        """The client has sent its last message."""
        self._half_closed = True
        _wake(self._reader)

    def expect_one_message(self) -> None:
        """The handler takes one message: the client has `Limits.body_timeout` to send it, and may send no other."""
        if not self._finished:
            self._connection.expect_one_message(self._stream)

    def writable(self) -> None:
        """Enough of the queued output has been written."""
        _wake(self._writer)

    def peer_cancelled(self) -> None:
        """Nothing can be sent on the stream any more."""
        self._stop()

    # -- called by the server -------------------------------------------------------------------------------------

    def terminate(self, code: int, details: str) -> None:
        """End the call with a status that the handler did not choose, and cancel the handler's task."""
        self._connection.send_status(self._stream, code, details)
        self._protocol.wake()
        self._stop()

    def finish(self) -> None:
        """The handler has ended, by returning, failing or being cancelled. The call is no longer counted."""
        self._stop_timer()
        self._finished = True
        connection = self._connection
        if not self._stream.closed:
            connection.send_status(self._stream, StatusCode.CANCELLED, "The handler was cancelled")
        while self._inbox:
            connection.consumed(self._stream, len(self._inbox.popleft()))
        connection.finished(self._stream)
        self._protocol.wake()
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback(self)
        # Stream, task and context refer to each other. Without this statement they would stay in memory until a garbage
        # collection.
        self._stream.call = None
        self.task = None

    def _expire(self) -> None:
        """The deadline has passed: answer with a status if nothing was sent yet, else reset the stream."""
        self._timer = None
        if self._stream.closed:
            return
        if self._stream.headers_sent:
            self._connection.cancel(self._stream, ErrorCode.CANCEL)
            self._protocol.wake()
            self._stop()
        else:
            self.terminate(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _stop(self) -> None:
        self._stop_timer()
        self._finished = self._ended_early = True
        _wake(self._reader)
        _wake(self._writer)
        if self.task is not None:
            self.task.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- messages -------------------------------------------------------------------------------------------------

    async def receive(self) -> bytes | None:
        """The next message, not deserialized; None after the last one."""
        while not self._inbox:
            if self._finished:
                raise asyncio.CancelledError
            if self._half_closed:
                return None
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        message = self._inbox.popleft()
        self._connection.consumed(self._stream, len(message))
        if not self._half_closed:
            self._protocol.wake()  # window updates may be due now
        return message

    def note_refused(self, reason: str) -> None:
        """Log that this call was refused, with the address of the peer. The log's rate is limited, as for all faults of
        clients."""
        self._protocol.note_refused(reason)

    def deserialize(self, message: bytes) -> Any:
        """``message`` as the handler's request type. Raises `UnreadableMessage` (INTERNAL) if the conversion fails."""
        if self.deserializer is None:
            return message
        try:
            return self.deserializer(message)
        except Exception as error:
            raise UnreadableMessage(StatusCode.INTERNAL, "Exception deserializing request!") from error

    def serialize(self, message: Any) -> bytes:
        """The octets of a handler's message. Raises `CallFault` (INTERNAL) if it cannot be serialized."""
        if self.serializer is None:
            octets = message
        else:
            try:
                octets = self.serializer(message)
            except Exception as error:
                raise CallFault(StatusCode.INTERNAL, "Failed to serialize response!") from error
        if not isinstance(octets, bytes | memoryview):
            raise CallFault(StatusCode.INTERNAL, "Failed to serialize response!")
        return octets  # type: ignore[return-value]

    def put(self, octets: bytes) -> None:
        """Queue a serialized message. It is compressed if the handler chose compression and the client accepts it."""
        connection, stream = self._connection, self._stream
        gzip = self._gzip
        if not stream.headers_sent:
            connection.send_initial_metadata(stream, (), "gzip" if gzip else None)
        compressed = gzip and not self._plain_next
        self._plain_next = False
        connection.send_message(stream, compress_gzip(octets) if compressed else octets, compressed=compressed)
        self._protocol.wake()

    async def send(self, octets: bytes) -> None:
        """`put`, then wait until the client has taken enough of the queued output."""
        if self._finished or self._stream.closed:
            raise asyncio.InvalidStateError("RPC already finished.")
        self.put(octets)
        while not self._stream.writable:
            if self._finished or self._stream.closed:
                raise asyncio.CancelledError
            self._writer = self._loop.create_future()
            try:
                await self._writer
            finally:
                self._writer = None

    def end(self, code: int | None = None, details: str | None = None) -> None:
        """The handler has ended: send its status, or ``code`` and ``details`` instead."""
        if code is None or self._aborted:
            code, details = self.status, self._details
        self._connection.send_status(self._stream, code, details or "", self._trailing)
        self._protocol.wake()

    @property
    def status(self) -> int:
        """The status that the handler has set, by number."""
        return _number(self._code)

    @property
    def _gzip(self) -> bool:
        request = self._stream.request
        return self._compression == _GZIP and request is not None and "gzip" in request.accepts

    # -- grpc.aio.ServicerContext ---------------------------------------------------------------------------------

    async def read(self) -> Any:
        """The next request message, or EOF after the last one."""
        message = await self.receive()
        return self._eof if message is None else self.deserialize(message)

    async def write(self, message: Any) -> None:
        """Send a response message; returns when the client has room for more.

        Raises:
            asyncio.InvalidStateError: if the call has ended.
        """
        await self.send(self.serialize(message))

    def metadata_out(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Send the response headers. Raises ValueError for invalid metadata, or if the headers were sent already."""
        if self._stream.headers_sent:
            raise ValueError("initial metadata has been sent")
        entries = _checked(metadata)
        self._connection.send_initial_metadata(self._stream, entries, "gzip" if self._gzip else None)
        self._protocol.wake()

    async def send_initial_metadata(self, initial_metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """The initial metadata as fields: see `metadata_out`."""
        self.metadata_out(initial_metadata)

    def set_aborted(
        self, code: Any, details: str = "", trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> None:
        """Set the final status. Nothing that the handler does afterwards changes it."""
        self._code, self._details = code, details
        if _number(code) == StatusCode.OK:
            self._code = StatusCode.UNKNOWN  # an abort is not a success
        if trailing_metadata:
            self._trailing = _checked(trailing_metadata)
        self._aborted = True

    async def abort(
        self, code: Any, details: str = "", trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> NoReturn:
        """End the call with a status. Always raises `AbortError`."""
        self.set_aborted(code, details, trailing_metadata)
        self.end()
        raise AbortError("Locally aborted.")

    async def abort_with_status(self, status: Any) -> NoReturn:
        """`abort` with the ``code``, ``details`` and ``trailing_metadata`` of one object."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_trailing_metadata(self, trailing_metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Set the metadata that is sent with the status. Raises ValueError for invalid metadata."""
        self._trailing = _checked(trailing_metadata)

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The metadata of `set_trailing_metadata`."""
        return self._trailing

    def invocation_metadata(self) -> tuple[Metadatum, ...]:
        """The client's metadata."""
        request = self._stream.request
        return () if request is None else tuple([Metadatum(*entry) for entry in request.metadata])

    def set_code(self, code: Any) -> None:
        """Set the status of the call: a ``grpc.StatusCode``, or its number."""
        if not self._aborted:
            self._code = code

    def set_details(self, details: str) -> None:
        """Set the status message."""
        if not self._aborted:
            self._details = details

    def code(self) -> Any:
        """The value that `set_code` got; None if it was not called."""
        return self._code

    def details(self) -> str:
        """The value that `set_details` got."""
        return self._details

    def set_compression(self, compression: Any) -> None:
        """Set a ``grpc.Compression`` for the messages of this call. Raises RuntimeError if the headers were sent
        already."""
        if self._stream.headers_sent:
            raise RuntimeError("Compression setting must be specified before sending initial metadata")
        self._compression = compression if isinstance(compression, int) else compression.value

    def disable_next_message_compression(self) -> None:
        """Send the next message uncompressed."""
        self._plain_next = True

    def peer(self) -> str:
        """The client's address: ``ipv4:1.2.3.4:5678``."""
        return self._protocol.peer

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """The properties of the client that TLS has established."""
        return self._protocol.auth_context()

    def peer_identity_key(self) -> str | None:
        """The property of `auth_context` that names the client, if the client presented a certificate."""
        known = self.auth_context()
        for key in ("x509_subject_alternative_name", "x509_common_name"):
            if key in known:
                return key
        return None

    def peer_identities(self) -> Iterable[bytes] | None:
        """The client's names in its certificate."""
        key = self.peer_identity_key()
        return None if key is None else self.auth_context()[key]

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, not below 0; None without a deadline."""
        return None if self._expires is None else max(0.0, self._expires - self._loop.time())

    def cancelled(self) -> bool:
        """Whether something other than its handler ended the call."""
        return self._ended_early

    def done(self) -> bool:
        """Whether the call has ended."""
        return self._finished or self._stream.closed

    def is_active(self) -> bool:
        """Whether the client still waits."""
        return not self.done()

    def cancel(self) -> None:
        """End the call as cancelled."""
        self.terminate(StatusCode.CANCELLED, "Cancelled by the server")

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        """Call ``callback(context)`` when the call's handler has ended."""
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(callback)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _number(code: Any) -> int:
    if code is None:
        return StatusCode.OK
    return code if isinstance(code, int) else int(code.value[0])


def _checked(metadata: Iterable[tuple[str, str | bytes]] | None) -> tuple[tuple[str, str | bytes], ...]:
    entries = tuple([(key, value) for key, value in metadata or ()])
    metadata_fields(entries)  # so that an error is raised in the handler, not later when the headers are written
    return entries
