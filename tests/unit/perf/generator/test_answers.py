"""The generator's client checks every answer, with any frames and compression of the server."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hpack.hpack import Encoder
from perf.generator.answers import Call, Expected, WrongAnswer, prefix
from perf.generator.connection import LoadConnection
from tests.support import wire

FOUND = Call(wire.command_request(b"if"), Expected(0, b"content of if"))
OTHER = Call(wire.command_request(b"or"), Expected(0, b"content of or"))
MISSING = Call(wire.command_request(b"no"), Expected(5, b"Command 'no' not found"))
LOST = Call(wire.command_request(b"xx"), Expected(5, b"Command 'xx' not found"))
HEADERS = [(b":status", b"200"), (b"content-type", b"application/grpc")]
OK = [(b"grpc-status", b"0")]


class Client(LoadConnection):
    """Remembers which PINGs it has answered."""

    _ponged = b""

    def ponged(self, octets: bytes) -> bool:
        return octets == self._ponged

    def _write(self, octets: bytes) -> None:
        super()._write(octets)
        if octets[3:5] == bytes((wire.PING, wire.ACK)):
            self._ponged = octets[wire.HEAD :]


class Server:
    """The server's end of one connection; the test decides which octets it sends."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.client = Client(self.port, wire.BlockCycle(wire.call_fields(b"a", wire.GET_COMMAND, b"k")), [])
        self._sock, _ = self._listener.accept()
        self._sock.settimeout(5)
        self.encoder = Encoder()
        self._pings = 0

    def close(self) -> None:
        for each in (self.client.sock, self._sock, self._listener):
            each.close()

    def heard(self, octets: bytes) -> bool:
        """Whether the client sends ``octets``, perhaps after other octets."""
        told = b""
        while octets not in told:
            told += self._sock.recv(65_536)
        return True

    def block(self, fields: list[tuple[bytes, bytes]], *, table: bool) -> bytes:
        """With ``table``, entries are inserted and Huffman codes used; otherwise every field is a plain literal."""
        return self.encoder.encode(fields) if table else wire.literal_block(fields)

    def answer(self, stream: int, call: Call, *, table: bool = False, body: bytes | None = None) -> bytes:
        """The octets of a right answer, or of an answer with another ``body``."""
        if call.status:
            fields = [*HEADERS, (b"grpc-status", b"%d" % call.status), (b"grpc-message", call.content)]
            return wire.frame(wire.HEADERS, 5, stream, self.block(fields, table=table))
        body = prefix(call.length) + call.content if body is None else body
        return (
            wire.frame(wire.HEADERS, 4, stream, self.block(HEADERS, table=table))
            + wire.frame(wire.DATA, 0, stream, body)
            + wire.frame(wire.HEADERS, 5, stream, self.block(OK, table=table))
        )

    def says(self, octets: bytes) -> list[Call]:
        """Send ``octets``. Returns the calls that the client accepts as answered; a PING shows that it has read
        everything."""
        self._pings += 1
        self._sock.sendall(octets + wire.frame(wire.PING, 0, 0, b"%08d" % self._pings))
        self.client.sock.settimeout(5)
        done = [call for call, _ in self.client.receive()]
        while not self.client.ponged(b"%08d" % self._pings):
            done += [call for call, _ in self.client.receive()]
        return done

    def ask(self, *calls: Call) -> None:
        self.client.send([(call, 0.0) for call in calls])


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.mark.parametrize("table", [False, True], ids=["literals", "table"])
def test_right_answers_are_accepted_with_and_without_the_dynamic_table(server: Server, table: bool) -> None:
    calls = [FOUND, MISSING, OTHER, LOST, FOUND, MISSING]
    server.ask(*calls)
    octets = b"".join(server.answer(2 * number + 1, call, table=table) for number, call in enumerate(calls))
    assert server.says(octets) == calls
    assert not server.client.inflight


def test_an_answer_is_compared_as_a_whole_once_its_shape_is_known(server: Server) -> None:
    server.ask(*[FOUND] * 50, *[MISSING] * 50)
    octets = b"".join(server.answer(2 * n + 1, FOUND if n < 50 else MISSING) for n in range(100))
    assert len(server.says(octets)) == 100
    assert server.client.taken_apart == 2


def test_answers_are_compared_as_a_whole_once_the_table_no_longer_changes(server: Server) -> None:
    server.ask(*[FOUND] * 50)
    assert len(server.says(b"".join(server.answer(2 * n + 1, FOUND, table=True) for n in range(50)))) == 50
    assert server.client.taken_apart == 2  # the first answer inserts entries, the second refers to them


def test_a_known_block_is_decoded_again_after_the_table_has_changed(server: Server) -> None:
    server.ask(*[FOUND] * 3)
    assert len(server.says(b"".join(server.answer(2 * n + 1, FOUND, table=True) for n in range(2)))) == 2
    stale = wire.frame(wire.HEADERS, 4, 5, server.block(HEADERS, table=True)) + wire.frame(
        wire.DATA, 0, 5, prefix(FOUND.length) + FOUND.content
    )
    trailers = server.block(OK, table=True)
    moved = server.block([(b"grpc-status", b"13")], table=True)  # the newest entry now: the index of OK grows by one
    with pytest.raises(WrongAnswer, match="13"):
        server.says(
            stale + wire.frame(wire.HEADERS, 4, 5, moved) + wire.frame(wire.HEADERS, wire.END_STREAM | 4, 5, trailers)
        )


def test_the_shape_of_an_answer_is_dropped_when_the_table_changes(server: Server) -> None:
    server.ask(FOUND, FOUND, MISSING, FOUND)
    server.says(server.answer(1, FOUND, table=True))
    octets = server.answer(3, FOUND, table=True)
    server.says(octets)
    server.says(server.answer(5, MISSING, table=True))
    # The same octets, for another stream: their indices now refer to other fields.
    with pytest.raises(WrongAnswer, match="gRPC status"):
        server.says(octets.replace(b"\0\0\0\x03", b"\0\0\0\x07"))


def test_answers_with_interleaved_and_split_frames_are_accepted(server: Server) -> None:
    server.ask(FOUND, OTHER, FOUND, OTHER)
    server.says(server.answer(1, FOUND) + server.answer(3, OTHER))
    body, half = prefix(FOUND.length) + FOUND.content, 7
    heads = b"".join(wire.frame(wire.HEADERS, 4, stream, server.block(HEADERS, table=False)) for stream in (5, 7))
    data = (
        wire.frame(wire.DATA, 0, 5, body[:half])
        + wire.frame(wire.DATA, 0, 7, prefix(OTHER.length) + OTHER.content)
        + wire.frame(wire.DATA, 0x8, 5, b"\x03" + body[half:] + bytes(3))
    )
    ends = b"".join(wire.frame(wire.HEADERS, 5, stream, server.block(OK, table=False)) for stream in (7, 5))
    assert set(server.says(heads + data + ends)) == {FOUND, OTHER}


def test_an_answer_that_arrives_octet_by_octet_is_accepted(server: Server) -> None:
    server.ask(FOUND, FOUND)
    server.says(server.answer(1, FOUND))
    server.client.sock.settimeout(5)
    done = []
    for octet in server.answer(3, FOUND):
        server._sock.sendall(bytes((octet,)))
        done.append(len(server.client.receive()))
    assert done == [0] * (len(done) - 1) + [1]
    assert server.client.taken_apart == 1


@pytest.mark.parametrize("known", [0, 2], ids=["the first answer", "shape known"])
@pytest.mark.parametrize(
    ("call", "wrong", "told"),
    [
        (FOUND, OTHER, "right length"),
        (FOUND, Call(b"", Expected(0, b"content of if, and more")), "a body of 28 octets, expected 18"),
        (FOUND, Call(b"", Expected(0, b"")), "a body of 5 octets"),
        (FOUND, MISSING, "gRPC status '5'"),
        (MISSING, FOUND, "gRPC status '0'"),
        (MISSING, Call(b"", Expected(16, b"Invalid Credentials")), "'16' 'Invalid Credentials', expected 5"),
        (MISSING, Call(b"", Expected(5, b"Command 'on' not found")), "'on' not found"),
    ],
)
@pytest.mark.parametrize("table", [False, True], ids=["literals", "table"])
def test_a_wrong_answer_is_never_accepted(
    server: Server, call: Call, wrong: Call, told: str, known: int, table: bool
) -> None:
    server.ask(*[call] * (known + 1))
    for number in range(known):
        server.says(server.answer(2 * number + 1, call, table=table))
    with pytest.raises(WrongAnswer, match=told):
        server.says(server.answer(2 * known + 1, wrong, table=table))


def test_an_answer_on_another_stream_is_wrong(server: Server) -> None:
    server.ask(FOUND, FOUND, OTHER)
    server.says(server.answer(1, FOUND))
    with pytest.raises(WrongAnswer, match="other content"):
        server.says(server.answer(5, FOUND) + server.answer(3, OTHER))


@pytest.mark.parametrize(
    ("octets", "told"),
    [
        (wire.frame(wire.RST_STREAM, 0, 1, b"\0\0\0\x07"), "reset with HTTP/2 error 7"),
        (wire.frame(wire.GOAWAY, 0, 0, b"\0\0\0\0\0\0\0\x0bcalm"), "ends the connection.*error 11.*calm"),
        (wire.frame(wire.DATA, 0, 9, b"x"), "unexpected frame of type 0 on stream 9"),
        (wire.frame(wire.HEADERS, 4, 1, b"\xff\xff\xff\xff\xff\xff"), "cannot be decoded"),
        (wire.frame(wire.HEADERS, 5, 1, wire.literal_block([(b":status", b"503")])), "HTTP status '503'"),
        (wire.frame(wire.HEADERS, 5, 1, wire.literal_block(HEADERS)), "gRPC status nothing"),
        (wire.settings((1, 0)), "header table of 0 octets"),
    ],
)
def test_the_end_of_a_call_or_connection_is_reported_with_its_reason(server: Server, octets: bytes, told: str) -> None:
    server.ask(FOUND)
    with pytest.raises(WrongAnswer, match=told):
        server.says(octets)


def test_the_end_of_a_connection_is_reported_with_the_number_of_unanswered_calls(server: Server) -> None:
    server.ask(FOUND, OTHER)
    server.heard(FOUND.request)
    server._sock.close()
    server.client.sock.settimeout(5)
    with pytest.raises(WrongAnswer, match=r"closed the connection, 2 calls|connection was lost"):
        server.client.receive()


def test_settings_and_pings_between_answers_are_handled(server: Server) -> None:
    server.ask(FOUND, FOUND)
    between = wire.settings((3, 100)) + wire.window_update(0, 1000) + wire.window_update(3, 5)
    octets = server.answer(1, FOUND) + between + wire.frame(wire.PING, 0, 0, b"12345678") + server.answer(3, FOUND)
    server._sock.sendall(octets)
    server.client.sock.settimeout(5)
    done: list[Call] = []
    while len(done) < 2:
        done += [call for call, _ in server.client.receive()]
    assert server.heard(wire.frame(wire.SETTINGS, wire.ACK, 0) + wire.frame(wire.PING, wire.ACK, 0, b"12345678"))


def test_calls_beyond_the_server_s_number_of_streams_wait_and_are_sent_later(server: Server) -> None:
    server.says(wire.settings((3, 2)))
    server.ask(FOUND, OTHER, FOUND, OTHER)
    assert (len(server.client.inflight), len(server.client.waiting)) == (2, 2)
    server.says(server.answer(1, FOUND))
    assert [call for call, _ in server.client.inflight.values()] == [OTHER, FOUND]
    assert server.says(server.answer(3, OTHER) + server.answer(5, FOUND)) == [OTHER, FOUND]


def test_calls_beyond_the_server_s_window_wait_in_their_order(server: Server) -> None:
    many = wire.INITIAL_WINDOW // FOUND.octets
    server.says(wire.settings((3, 100_000)))
    server.ask(*[FOUND] * many, OTHER, MISSING)
    assert [call for call, _ in server.client.waiting] == [OTHER, MISSING]
    server.says(wire.window_update(0, 2 * FOUND.octets))
    assert not server.client.waiting
    assert [call for call, _ in server.client.inflight.values()][-2:] == [OTHER, MISSING]


def test_a_call_that_waits_for_the_window_is_sent_before_one_that_waits_for_a_stream(server: Server) -> None:
    many = wire.INITIAL_WINDOW // FOUND.octets
    server.says(wire.settings((3, many + 2)))
    server.ask(*[FOUND] * many)
    server.ask(OTHER, MISSING, LOST, FOUND)
    assert [call for call, _ in server.client.waiting] == [OTHER, MISSING, LOST, FOUND]
