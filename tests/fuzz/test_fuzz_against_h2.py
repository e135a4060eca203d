"""A state machine over frames, with python-hyper's `h2` as the client: `h2` must accept everything that the engine
sends."""

from __future__ import annotations

import os

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from tests.support.h2_peer import ANSWER, GUARDED, HANDLED, REFUSING, STATIC, some_router
from tests.support.h2_wire import grpc_message, request_fields
from tests.support.hypothesis_profiles import examples

from grpc_h2 import (
    CallCancelled,
    CallStarted,
    Connection,
    ConnectionClosing,
    Event,
    HalfClosed,
    Limits,
    MessageReceived,
    Stream,
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or examples(40))
WANTED = {STATIC: (b"0", grpc_message(ANSWER)), REFUSING: (b"5", b""), GUARDED: (b"0", grpc_message(ANSWER))}


class Call:
    """The expected outcome of one call, and its present outcome."""

    def __init__(self, path: bytes, unsent: bytes) -> None:
        self.path = path
        self.unsent = unsent
        self.ended_by_client = False
        self.reset_by_client = False
        self.body = b""
        self.status: bytes | None = None
        self.ended = False
        self.reset: int | None = None
        self.replied: bytes | None = None
        """The message that the handler has sent; its status is 7."""
        self.replied_early = False


class Client(RuleBasedStateMachine):
    """A client, its network and a handler; each rule is an action of one of them."""

    open_calls: Bundle[int] = Bundle("open_calls")

    @initialize(window=st.sampled_from([65535, 0, 1, 20, 10**6]), table=st.sampled_from([4096, 0, 100]))
    def start(self, window: int, table: int) -> None:
        self.now = 0.0
        self.engine = Connection(some_router(), Limits(min_ping_interval=0.0), self.now)
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self.client.initiate_connection()
        codes = h2.settings.SettingCodes
        self.client.update_settings({codes.INITIAL_WINDOW_SIZE: window, codes.HEADER_TABLE_SIZE: table})
        self.calls: dict[int, Call] = {}
        self.handled: dict[int, Stream] = {}
        self.received: dict[int, list[bytes]] = {}
        self.half_closed: set[int] = set()
        self.cancelled: set[int] = set()
        self.unacknowledged: dict[int, int] = {}
        self.pings = self.pongs = 0
        self.exchange()

    # -- the network ----------------------------------------------------------------------------------------------

    def exchange(self, size: int = 10**9) -> None:
        """Carry octets both ways until neither end sends more."""
        for _ in range(1000):
            outbound = self.client.data_to_send()
            for at in range(0, len(outbound), size):
                self._events(self.engine.receive_data(outbound[at : at + size], self.now))
            while self.engine.backlog:
                self._events(self.engine.receive_data(b"", self.now))
            inbound = b"".join(self.engine.data_to_send())
            for event in self.client.receive_data(inbound) if inbound else ():
                self._seen(event)
            if not inbound and not outbound:
                return
        raise AssertionError("client and engine never stop sending")

    def _events(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case CallStarted(stream):
                    self.handled[stream.id] = stream
                case MessageReceived(stream, message):
                    self.received.setdefault(stream.id, []).append(message)
                    self.engine.consumed(stream, len(message))
                case HalfClosed(stream):
                    self.half_closed.add(stream.id)
                case CallCancelled(stream, _):
                    self.cancelled.add(stream.id)
                    self.engine.finished(stream)
                case ConnectionClosing(_, reason):
                    raise AssertionError(f"the connection must not end: {reason}")

    def _seen(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived():
                self.calls[event.stream_id].body += event.data
                counted = self.unacknowledged.get(event.stream_id, 0)
                self.unacknowledged[event.stream_id] = counted + event.flow_controlled_length
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                fields = dict(event.headers)
                self.calls[event.stream_id].status = fields.get(b"grpc-status")
            case h2.events.StreamEnded():
                self.calls[event.stream_id].ended = True
            case h2.events.StreamReset():
                self.calls[event.stream_id].reset = event.error_code
            case h2.events.PingAckReceived():
                self.pongs += 1
            case h2.events.ConnectionTerminated():
                raise AssertionError(f"GOAWAY: {event.additional_data!r}")

    # -- actions of a client ----------------------------------------------------------------------------------------

    @rule(
        target=open_calls,
        path=st.sampled_from([STATIC, REFUSING, GUARDED, HANDLED, HANDLED]),
        messages=st.lists(st.sampled_from([b"", b"world", b"x" * 3000]), max_size=3),
        padding=st.sampled_from([b"", b"p" * 5000]),
        timeout=st.integers(1, 3),
        size=st.sampled_from([1, 10**9]),
    )
    def open(self, path: bytes, messages: list[bytes], padding: bytes, timeout: int, size: int) -> object:
        if self.client.open_outbound_streams >= 90:
            return multiple()
        stream = self.client.get_next_available_stream_id()
        body = grpc_message(b"world") if path != HANDLED else b"".join(map(grpc_message, messages))
        self.calls[stream] = Call(path, body)
        call_messages = [b"world"] if path != HANDLED else messages
        self.sent_messages = getattr(self, "sent_messages", {}) | {stream: call_messages}
        extra = [(b"pad", padding)] if padding else []
        fields = request_fields(path, *extra, grpc_timeout=b"%dS" % timeout)
        self.client.send_headers(stream, fields)
        self.exchange(size)
        return stream

    @rule(
        stream=open_calls,
        size=st.integers(0, 4000),
        pad=st.sampled_from([None, 0, 7]),
        cut=st.sampled_from([1, 5, 10**9]),
    )
    def send(self, stream: int, size: int, pad: int | None, cut: int) -> None:
        call = self.calls[stream]
        if call.ended_by_client or call.reset is not None or call.reset_by_client:
            return
        size = min(size, len(call.unsent), self.client.local_flow_control_window(stream) - 8)
        if size >= 0:
            self.client.send_data(stream, call.unsent[:size], pad_length=pad)
            call.unsent = call.unsent[size:]
            self.exchange(cut)

    @rule(stream=consumes(open_calls))
    def finish(self, stream: int) -> None:
        call = self.calls[stream]
        if call.reset is not None or call.reset_by_client:
            return
        while call.unsent:
            size = min(len(call.unsent), self.client.local_flow_control_window(stream), 16384)
            assert size > 0, "the engine gives no window back"
            self.client.send_data(stream, call.unsent[:size])
            call.unsent = call.unsent[size:]
            self.exchange()
        if call.reset is None:
            self.client.end_stream(stream)
            call.ended_by_client = True
        self.exchange()

    @rule(stream=open_calls)
    def reset(self, stream: int) -> None:
        call = self.calls[stream]
        if call.ended or call.reset is not None or call.reset_by_client:
            return
        self.client.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        call.reset_by_client = True
        self.exchange()

    @rule(payload=st.binary(min_size=8, max_size=8))
    def ping(self, payload: bytes) -> None:
        self.client.ping(payload)
        self.pings += 1
        self.exchange()
        assert self.pongs == self.pings

    @rule(window=st.sampled_from([0, 5, 65535, 10**6]))
    def change_window(self, window: int) -> None:
        self.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.exchange()

    @rule(table=st.sampled_from([0, 64, 4096, 10_000]), size=st.sampled_from([16384, 20_000, 2**24 - 1]))
    def change_sizes(self, table: int, size: int) -> None:
        codes = h2.settings.SettingCodes
        self.client.update_settings({codes.HEADER_TABLE_SIZE: table, codes.MAX_FRAME_SIZE: size})
        self.exchange()

    @rule()
    def acknowledge(self) -> None:
        for stream, octets in self.unacknowledged.items():
            self.client.acknowledge_received_data(octets, stream)
        self.unacknowledged.clear()
        self.exchange()

    # -- actions of handlers -------------------------------------------------------------------------------------------

    def _live(self) -> list[int]:
        live = self.handled.keys() - self.cancelled
        return sorted(stream for stream in live if self.calls[stream].replied is None)

    @rule(which=st.integers(0, 50), sizes=st.lists(st.sampled_from([0, 1, 100, 70_000]), max_size=3))
    def answer(self, which: int, sizes: list[int]) -> None:
        live = self._live()
        if not live:
            return
        stream = self.handled[live[which % len(live)]]
        call = self.calls[stream.id]
        call.replied = b""
        call.replied_early = stream.id not in self.half_closed
        for size in sizes:
            self.engine.send_message(stream, bytes(size))
            call.replied += grpc_message(bytes(size))
        self.engine.send_status(stream, 7, "no")
        self.engine.finished(stream)
        self.exchange()

    # -- invariants ----------------------------------------------------------------------------------------------------

    @invariant()
    def handlers_are_counted(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.open_calls == len(self._live())
            assert not self.engine.terminated
            self.engine.check_invariants()

    def teardown(self) -> None:
        """Open every window; then each call must end."""
        if not hasattr(self, "engine"):
            return
        for stream, call in self.calls.items():
            if not call.ended_by_client:
                self.finish_now(stream, call)
        while live := self._live():
            stream = self.handled[live[0]]
            self.calls[stream.id].replied = b""
            self.engine.send_status(stream, 7, "at last")
            self.engine.finished(stream)
            self.exchange()
        self.change_window(10**6)
        for _ in range(200):
            if not self.unacknowledged:
                break
            self.acknowledge()
        for stream, call in self.calls.items():
            self.judge(stream, call)
        assert self.engine.open_calls == 0

    def finish_now(self, stream: int, call: Call) -> None:
        if call.reset is None and not call.reset_by_client:
            while call.unsent:
                size = min(len(call.unsent), self.client.local_flow_control_window(stream), 16384)
                assert size > 0, "the engine gives no window back"
                self.client.send_data(stream, call.unsent[:size])
                call.unsent = call.unsent[size:]
                self.exchange()
                if call.reset is not None:
                    return
            self.client.end_stream(stream)
            call.ended_by_client = True
            self.exchange()

    def judge(self, stream: int, call: Call) -> None:
        if call.reset_by_client:
            return
        assert call.ended, (stream, vars(call))
        if call.path == HANDLED:
            assert (call.status, call.body) == (b"7", call.replied)
            assert call.reset in (None, 0)
            if not call.replied_early:
                assert self.received.get(stream, []) == self.sent_messages[stream]
                assert stream in self.half_closed
        else:
            assert (call.status, call.body) == WANTED[call.path]


Client.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=20, deadline=None)
TestClient = Client.TestCase
