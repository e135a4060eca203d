"""Answers that exist before they are asked for, and the way from a request's fields to them.

**Theory.** A unary method whose answers are known octets needs no handler. What is sent for it, three frames, depends
on the request in nothing but the stream id, which stands in three places; so an `Answer` keeps the four pieces between
them, and ``stream_id.join(pieces)`` is the whole encoding. Three memories lead from request to answer, each sound for
a reason of its own:

- *block → route*, per connection (``connection.py``): valid while the connection's HPACK table does not change.
- *fields → route* (`Router`): interpreting fields is pure; what may change is who is let in, so key rotation drops it.
- *message → answer* (`StaticUnary`): valid until the application says that its data changed. Then everything would have
  to be looked up again by the calls that come next, all at once; so answers to what is remembered can be prepared
  beforehand, bit by bit, and take the place of the old ones.

All are bounded in number and in what they may hold, for their keys come from the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from grpc_h2.rpc.requests import Request, interpret
from grpc_h2.rpc.responses import initial_block, trailers_block, trailers_only_block
from grpc_h2.wire import frames
from grpc_h2.wire.errors import CallFault, HttpFault
from grpc_h2.wire.hpack import Field

Metadata = tuple[tuple[str, str | bytes], ...]
Lookup = Callable[[bytes], "Answer"]
Authorize = Callable[[Metadata], "Answer | None"]

_OK_HEADERS: Final = initial_block((), None)
_OK_TRAILERS: Final = trailers_block(0, "", ())
_PREFIX = 5
_REMEMBERED_ANSWERS = 4096
_REMEMBERED_FAILURES = 256
_FREED_AT_ONCE = 8
_LARGEST_REMEMBERED_REQUEST = 256
_REMEMBERED_ROUTES = 256
_LARGEST_REMEMBERED_FIELDS = 1024
UNKNOWN_LENGTH: Final = -1


class Answer:
    """The ready answer to a unary call.

    ``pieces`` are the frames without their stream ids, or None where the message does not fit one DATA frame that every
    peer accepts; ``size`` is what they take of the flow-control windows. ``answer_id`` is the application's own: the
    connection reports it once for each time the answer is given.
    """

    __slots__ = ("answer_id", "block", "lasting", "message", "pieces", "size")

    def __init__(
        self,
        pieces: tuple[bytes, ...] | None,
        size: int,
        message: bytes | memoryview | None,
        block: bytes,
        answer_id: int,
    ) -> None:
        self.pieces = pieces
        self.size = size
        self.message = message
        """What to frame; None: there is no message, only a status."""
        self.block = block
        """The terminal header block."""
        self.answer_id = answer_id
        self.lasting = True
        """Whether the same request is answered the same until the application's data changes."""

    @classmethod
    def unary(cls, message: bytes | memoryview, answer_id: int = 0) -> Answer:
        """Status OK and a serialized message. A large message is kept as it is, uncopied."""
        size = _PREFIX + len(message)
        prefix = b"\0" + len(message).to_bytes(4, "big")
        if size > frames.DEFAULT_FRAME_SIZE:
            return cls(None, size, message, _OK_TRAILERS, answer_id)
        pieces = (
            frames.head(frames.HEADERS, frames.END_HEADERS, len(_OK_HEADERS)),
            _OK_HEADERS + frames.head(frames.DATA, 0, size),
            b"".join(
                (
                    prefix,
                    message,
                    frames.head(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, len(_OK_TRAILERS)),
                )
            ),
            _OK_TRAILERS,
        )
        return cls(pieces, size, message, _OK_TRAILERS, answer_id)

    @classmethod
    def failure(cls, status: int, message: str, answer_id: int = 0, *, lasting: bool = True) -> Answer:
        """A gRPC status without a message: one HEADERS frame. Not ``lasting``: it is looked up anew each time."""
        block = trailers_only_block(status, message, ())
        head = frames.head(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, len(block))
        answer = cls((head, block), 0, None, block, answer_id)
        answer.lasting = lasting
        return answer


class _Remembered(dict[bytes, Answer | None]):
    """Length-prefixed message → answer; what is missing is looked up once.

    A dict with ``__missing__`` answers a hit without running any Python. Two generations bound it: when the young one
    is full it becomes the old one, and what was old and not asked for again is dropped. Freeing thousands of answers
    takes milliseconds, which some request would have to wait; so what is dropped is freed a few at a time, whenever
    something new is looked up. It never lags behind: no more can have been remembered than was looked up. Only what
    `take_over` drops is made up by nothing that is looked up: its caller sees to `free_some`.
    """

    __slots__ = ("_failures", "_lookup", "_old", "dropped")

    def __init__(self, lookup: Lookup) -> None:
        super().__init__()
        self._lookup = lookup
        self._old: dict[bytes, Answer | None] = {}
        self._failures: dict[bytes, Answer] = {}
        """Apart and few, so that a flood of names that nobody has defined drives out no answer that somebody needs."""
        self.dropped: list[dict[bytes, Answer | None]] = []

    def __missing__(self, payload: bytes) -> Answer | None:
        answer = self._failures.get(payload)
        if answer is not None:
            return answer
        answer = self._old.get(payload)
        if answer is None:
            # One whole, uncompressed message (PROTOCOL-HTTP2, Length-Prefixed-Message); anything else is taken apart
            # by a MessageReader.
            if len(payload) < _PREFIX or payload[0] or int.from_bytes(payload[1:_PREFIX], "big") != len(payload) - 5:
                return None
            answer = self._lookup(payload[_PREFIX:])
            # A large answer is not copied, so it costs nothing to make and holds on to the application's memory.
            if len(payload) > _LARGEST_REMEMBERED_REQUEST or answer.pieces is None or not answer.lasting:
                return answer
            if answer.message is None:
                if len(self._failures) >= _REMEMBERED_FAILURES:
                    self._failures.clear()
                self._failures[payload] = answer
                return answer
        if len(self) >= _REMEMBERED_ANSWERS:
            self._age()
        if self.dropped:
            self.free_some()
        self[payload] = answer
        return answer

    def requests(self) -> list[bytes]:
        """What is remembered, first what was asked for of late."""
        return [*self, *self._failures, *self._old]

    def take_over(self, other: _Remembered) -> None:
        """Remember what ``other`` does, and nothing else. In place: routes hold this object's ``__getitem__``."""
        self._age()
        self.dropped.append(self._old)
        self.update(other)
        self._old, self._failures = other._old, other._failures

    def forget(self) -> None:
        """Drop everything."""
        self._failures.clear()
        self._age()
        self._age()

    def _age(self) -> None:
        if self._old:
            self.dropped.append(self._old)
        self._old = dict(self)
        self.clear()

    def free_some(self) -> None:
        """Free a few of the answers in ``dropped``, which holds some."""
        oldest = self.dropped[-1]
        for _ in range(min(_FREED_AT_ONCE, len(oldest))):
            oldest.popitem()
        if not oldest:
            self.dropped.pop()


class StaticUnary:
    """A unary method with ready answers: `Router.add_static_unary`."""

    __slots__ = ("_prepared", "_remembered", "answer_payload", "authorize", "lookup", "path")

    def __init__(self, path: str, lookup: Lookup, authorize: Authorize | None) -> None:
        self.path = path
        self.lookup = lookup
        """Message → answer. Raises nothing."""
        self.authorize = authorize
        """Metadata → the refusal to answer with, or None to let the call in."""
        self._remembered = _Remembered(lookup)
        self._prepared: _Remembered | None = None
        self.answer_payload: Callable[[bytes], Answer | None] = self._remembered.__getitem__
        """Length-prefixed message → answer, or None where it is not one plain message."""

    def forget(self) -> None:
        """The application's data changed: remembered answers are dropped, and prepared ones."""
        self._remembered.forget()
        self._prepared = None

    def prepare(self, lookup: Lookup) -> Iterator[None]:
        """Ask ``lookup``, which answers from data to come, for everything that is remembered now: one at each step.

        About 10 µs a step, and at most `_REMEMBERED_ANSWERS` twice and `_REMEMBERED_FAILURES` steps. It need not come
        to its end: what is asked for often comes first, and the rest is looked up when it is asked for.
        """
        self._prepared = prepared = _Remembered(lookup)
        for payload in self._remembered.requests():
            prepared[payload]
            yield

    def renew(self) -> None:
        """The application's data changed to what answers were prepared from: they replace the remembered ones.

        Takes a tenth of a millisecond. `tidy` frees what was replaced. Where nothing was prepared it is `forget`.
        """
        if self._prepared is None:
            self.forget()
        else:
            self._remembered.take_over(self._prepared)
            self._prepared = None

    def tidy(self) -> Iterator[None]:
        """Free answers that were dropped, a few at each step. Calls that look something up do it too."""
        while self._remembered.dropped:
            self._remembered.free_some()
            yield


class Route:
    """Where a request goes, as far as its header fields alone decide that. Immutable and shared."""

    __slots__ = ("answer_payload", "content_length", "door", "fault", "lasting", "request")

    def __init__(
        self,
        request: Request | None,
        door: StaticUnary | None = None,
        fault: CallFault | HttpFault | None = None,
        refusal: Answer | None = None,
    ) -> None:
        self.request = request
        self.door = door
        self.lasting = refusal is None or refusal.lasting
        """Whether the route may be remembered."""
        # Its traceback would hold the frames, and what is in them, for as long as the route is remembered.
        self.fault = None if fault is None else fault.with_traceback(None)
        """What the call is answered with once the request has ended."""
        length = request.content_length if request is not None else fault.content_length if fault is not None else None
        self.content_length = UNKNOWN_LENGTH if length is None else length
        self.answer_payload: Callable[[bytes], Answer | None] | None = None
        """Length-prefixed message → answer, for static doors: a refusal is the same whatever was asked."""
        if refusal is not None:
            self.answer_payload = lambda _: refusal
        elif door is not None:
            self.answer_payload = door.answer_payload


class Router:
    """The static methods of a server, shared by all its connections."""

    def __init__(self) -> None:
        self._doors: dict[str, StaticUnary] = {}
        self._routes: dict[tuple[Field, ...], Route] = {}
        self.epoch = 0
        """Grows whenever a remembered route may have become wrong."""

    def add_static_unary(self, path: str, lookup: Lookup, authorize: Authorize | None = None) -> StaticUnary:
        """Answer calls of ``path`` with what ``lookup`` returns for their message, without any handler."""
        door = self._doors[path] = StaticUnary(path, lookup, authorize)
        self.forget_authorizations()
        return door

    def forget_authorizations(self) -> None:
        """Ask ``authorize`` again from now on, on open connections too: keys were rotated."""
        self._routes.clear()
        self.epoch += 1

    def route(self, fields: tuple[Field, ...], size: int) -> Route:
        """The route of a request with these ``fields`` (``grpc-timeout`` left out), their list ``size`` in octets.

        Raises:
            StreamFault: where the fields are no well-formed request.
        """
        route = self._routes.get(fields)
        if route is None:
            route = self._resolve(fields)
            if size <= _LARGEST_REMEMBERED_FIELDS and route.lasting:
                if len(self._routes) >= _REMEMBERED_ROUTES:
                    self._routes.clear()
                self._routes[fields] = route
        return route

    def _resolve(self, fields: tuple[Field, ...]) -> Route:
        try:
            request = interpret(fields)
        except (CallFault, HttpFault) as fault:
            return Route(None, fault=fault)
        door = self._doors.get(request.path)
        if door is None:
            return Route(request)
        refusal = None if door.authorize is None else door.authorize(request.metadata)
        return Route(request, door, refusal=refusal)
