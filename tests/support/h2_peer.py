"""A client in memory: it feeds a sans-IO `Connection`, and checks every octet of its output (RFC 9113)."""

from __future__ import annotations

from tests.support.h2_replies import Replies, Result
from tests.support.h2_wire import (
    HELLO,
    SETTINGS_ACK,
    Feed,
    call,
    headers,
    ping,
    request_block,
    whole,
)

from grpc_h2 import (
    CallCancelled,
    CallStarted,
    Connection,
    ConnectionClosing,
    Event,
    HalfClosed,
    Limits,
    MessageReceived,
    Metadata,
    Router,
    StaticAnswer,
    Stream,
)

STATIC = b"/t.S/Get"
REFUSING = b"/t.S/Missing"
GUARDED = b"/t.S/Guarded"
HANDLED = b"/t.S/Handled"
ANSWER = b"a definition"


class Keys:
    """The keys that the guarded method accepts; ``asked`` counts the authorizations."""

    def __init__(self, *valid: str) -> None:
        self.valid = set(valid)
        self.asked = 0

    def authorize(self, metadata: Metadata) -> StaticAnswer | None:
        self.asked += 1
        if any(name == "authorization" and value in self.valid for name, value in metadata):
            return None
        return StaticAnswer.failure(16, "who are you?", answer_id=16)


def handled(stream: int, *, end_stream: bool = True) -> bytes:
    """The HEADERS of a call that the test handles."""
    return headers(stream, request_block(HANDLED), end_stream=end_stream)


def some_router(keys: Keys | None = None) -> Router:
    """A router with three static methods: one answers, one fails, and one requires a key. Any other path has a
    handler."""
    router = Router()
    answer = StaticAnswer.unary(ANSWER, answer_id=1)
    router.add_static_unary(
        STATIC.decode(), lambda message: StaticAnswer.unary(message, answer_id=2) if message != b"world" else answer
    )
    router.add_static_unary(REFUSING.decode(), lambda message: StaticAnswer.failure(5, "no such thing", answer_id=3))
    router.add_static_unary(GUARDED.decode(), lambda message: answer, (keys or Keys("Bearer k1")).authorize)
    return router


class Peer:
    """A client of one `Connection`. `feed` divides the octets that it sends; each reply is checked at once.

    Calls of paths without a static method become `calls`; the test is their handler. The handler of a cancelled call
    ends at once, unless `slow_handlers`.
    """

    def __init__(
        self,
        feed: Feed = whole,
        *,
        router: Router | None = None,
        limits: Limits | None = None,
        hello: bytes | None = HELLO,
        slow_handlers: bool = False,
        reads: bool = True,
        consumes: bool = True,
        jitter: float = 0.0,
    ) -> None:
        self.now = 1000.0
        self.connection = Connection(router or some_router(), limits or Limits(), self.now, jitter)
        self.replies = Replies()
        self.events: list[Event] = []
        self.calls: dict[int, Stream] = {}
        self.received: dict[int, list[bytes]] = {}
        self.half_closed: set[int] = set()
        self.cancelled: dict[int, int] = {}
        self.closing: ConnectionClosing | None = None
        self.octets = 0
        """Octets that the server sent."""
        self.turns = 0
        self._feed = feed
        self._slow_handlers = slow_handlers
        self._reads = reads
        self._consumes = consumes
        self._probe = 2**31 - 10_001
        if hello is not None:
            self.send(hello, SETTINGS_ACK)

    # -- exchange -----------------------------------------------------------------------------------------------

    def send(self, *octets: bytes) -> Peer:
        """Send, let the connection work until nothing is deferred, and read the answers."""
        joined = b"".join(octets)
        self.replies.note_sent(joined)
        for piece in self._feed(joined):
            if self._reads and (answer := self.connection.answer_one(piece, self.now)) is not None:
                self.octets += len(answer)
                self.replies.feed(answer)
                continue
            self._take_events(self.connection.receive_data(piece, self.now))
            while self.connection.backlog and (self._reads or self.connection.wants_read):
                self.turns += 1
                if self._reads:
                    self.read()
                self._take_events(self.connection.receive_data(b"", self.now))
            if self._reads:
                self.read()
        self.connection.check_invariants()
        return self

    def read(self, budget: int = 262144) -> None:
        """Take all output that can be sent now."""
        while pieces := self.connection.data_to_send(budget):
            octets = b"".join(pieces)
            assert octets, "if there is nothing to send, the list is empty"
            self.octets += len(octets)
            self.replies.feed(octets)

    def advance(self, seconds: float) -> None:
        """Let time pass, with a tick whenever one is due."""
        end = self.now + seconds
        for _ in range(10_000):
            due = self.connection.next_deadline()
            if due is None or due > end:
                break
            self.now = max(self.now, due)
            self._take_events(self.connection.tick(self.now))
            self.read()
        else:
            raise AssertionError("a deadline that is always due")
        self.now = end
        self._take_events(self.connection.tick(end))
        self.read()
        self.connection.check_invariants()

    def _take_events(self, events: list[Event]) -> None:
        for event in events:
            self.events.append(event)
            match event:
                case CallStarted(stream):
                    assert stream.id not in self.calls
                    self.calls[stream.id] = stream
                case MessageReceived(stream, message):
                    assert stream.id not in self.half_closed
                    self.received.setdefault(stream.id, []).append(message)
                    if self._consumes:
                        self.connection.consumed(stream, len(message))
                case HalfClosed(stream):
                    self.half_closed.add(stream.id)
                case CallCancelled(stream, code):
                    assert stream.id not in self.cancelled
                    self.cancelled[stream.id] = code
                    if not self._slow_handlers:
                        self.connection.finished(stream)
                case ConnectionClosing():
                    assert self.closing is None, "a connection closes once"
                    self.closing = event

    # -- the handler --------------------------------------------------------------------------------------------

    def answer(self, stream: int, *messages: bytes, status: int = 0, text: str = "") -> None:
        """Play the handler of a call to its end."""
        handled = self.calls[stream]
        if messages:
            self.connection.send_initial_metadata(handled, ())
        for message in messages:
            self.connection.send_message(handled, message)
        self.connection.send_status(handled, status, text)
        self.connection.finished(handled)
        self.connection.check_invariants()
        self.read()

    # -- assertions ---------------------------------------------------------------------------------------------

    def result(self, stream: int) -> Result:
        return self.replies.stream(stream)

    @property
    def code(self) -> int | None:
        """The error code of the last GOAWAY."""
        return self.replies.goaways[-1][1] if self.replies.goaways else None

    def assert_answered(self, stream: int, *messages: bytes) -> None:
        """The stream had these messages (by default the static method's) and status OK."""
        result = self.result(stream)
        assert (result.status, result.reset, result.ended) == (0, None, True), (result, self.code, self.closing)
        assert result.http_status == 200
        assert result.messages == list(messages or (ANSWER,))

    def assert_answered_with(self, stream: int, status: int) -> None:
        """The stream ended with this status; the connection is not probed."""
        assert (self.result(stream).status, self.result(stream).ended) == (status, True), self.result(stream)

    def assert_answered_until_reset(self, stream: int) -> None:
        """The whole static answer arrived; later frames of the stream are not checked."""
        result = self.result(stream)
        assert (result.status, result.messages, result.ended) == (0, [ANSWER], True), result

    def assert_alive(self, stream: int | None = None) -> None:
        """The connection still echoes a PING and answers a new call."""
        if stream is None:
            stream = self._probe
            self._probe += 2
        self.send(ping(b"alive?!?"), call(stream))
        assert self.code is None, (self.replies.goaways, self.closing)
        assert self.replies.pongs[-1:] == [b"alive?!?"]
        self.assert_answered(stream)

    def assert_status(self, stream: int, status: int) -> None:
        """The call failed with `status` in one HEADERS frame, and the connection still works."""
        result = self.result(stream)
        assert result.status == status, (result, self.code)
        assert result.http_status == 200
        assert result.ended
        assert result.reset in (None, NO_ERROR_CODE)
        self.assert_alive()

    def assert_reset(self, stream: int, *codes: int) -> None:
        """The stream was reset with one of `codes`, and the connection still works."""
        assert self.result(stream).reset in codes, (self.result(stream), self.code, self.closing)
        self.assert_alive()

    def assert_closed(self, *codes: int) -> None:
        """The connection ended with one of `codes` in its GOAWAY, and answers nothing more."""
        assert self.code in codes, (self.replies.goaways, self.closing)
        assert self.closing is not None
        assert self.closing.code in codes
        assert self.connection.terminated
        assert not self.replies.cut
        told = len(self.replies.frames)
        self.send(ping(), call(2**31 - 3))
        assert len(self.replies.frames) == told, "a closed connection answers nothing"


NO_ERROR_CODE = 0
