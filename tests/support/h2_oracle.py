"""A connection whose answers show the header lists that it decoded, compared with the independent `hpack` library."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

import hpack
from tests.support.h2_peer import Peer, some_router
from tests.support.h2_wire import (
    COMPRESSION_ERROR,
    Feed,
    block,
    data,
    grpc_message,
    headers,
    indexed,
    inserting,
    integer,
    plain,
    size_update,
    string,
    whole,
)

from grpc_h2 import Limits, Metadata, Router, StaticAnswer

SHOWN = b"/t.S/Shown"
BODY = grpc_message(b"world")

# A gRPC request that neither reads nor changes the dynamic table.
REQUEST = block(
    [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", SHOWN),
        (b":authority", b"h"),
        (b"content-type", b"application/grpc"),
    ]
)


def shown(metadata: Iterable[tuple[object, object]]) -> str:
    plain_text = [(_text(name), _text(value)) for name, value in metadata]
    return " ".join(f"{name}={value[:1]}*{len(value)}" for name, value in plain_text if len(name) <= 2)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def showing_router() -> Router:
    router = some_router()

    def show(metadata: Metadata) -> StaticAnswer:
        return StaticAnswer.failure(9, shown(metadata))

    router.add_static_unary(SHOWN.decode(), lambda message: StaticAnswer.unary(b"never"), show)
    return router


class Oracle:
    """Sends blocks as calls of a static method, and compares the answers with the fields that the library decodes."""

    def __init__(self, feed: Feed = whole, limits: Limits | None = None) -> None:
        self.peer = Peer(feed, router=showing_router(), limits=limits)
        self.decoder = hpack.Decoder()
        self.stream = -1

    def call(self, atoms: bytes, request: bytes = REQUEST) -> None:
        """A call with `atoms` after the fields of the request."""
        self.stream += 2
        wanted = self.decode(request + atoms)
        self.peer.send(headers(self.stream, request + atoms), data(self.stream, BODY, end_stream=True))
        self.judge(wanted)

    def decode(self, octets: bytes) -> str:
        return shown(self.decoder.decode(octets, raw=True))

    def judge(self, wanted: str) -> None:
        result = self.peer.result(self.stream)
        assert result.status == 9, (result, self.peer.closing)
        assert unquote_to_bytes(result.text).decode() == wanted

    def send(self, octets: bytes) -> None:
        self.peer.send(octets)

    def assert_out_of_step(self, atoms: bytes) -> None:
        """Assert that a block that refers to an evicted entry is a compression error."""
        self.stream += 2
        self.peer.send(headers(self.stream, REQUEST + atoms))
        self.peer.assert_closed(COMPRESSION_ERROR)


A1, B2, C3 = inserting(b"a", b"1"), inserting(b"b", b"2"), inserting(b"c", b"3")
FIRST = indexed(62)
BIG = [inserting(name, name * 2000) for name in (b"x", b"y", b"z")]
OVERSIZE = inserting(b"o", b"v" * 5000)

REPLAYS: dict[str, list[bytes]] = {
    "insertion": [A1, FIRST, FIRST, B2, FIRST, FIRST],
    "insertion in the same block": [A1, FIRST, FIRST + B2, FIRST, FIRST + B2, FIRST],
    "a name from the table": [A1, b"\x7e" + string(b"9"), FIRST, b"\x7e" + string(b"9"), FIRST],
    "unindexed value, name from the table": [A1, integer(62, 4) + string(b"9"), B2, integer(62, 4) + string(b"9")],
    "never indexed, name from the table": [
        A1,
        integer(62, 4, 0x10) + string(b"9"),
        B2,
        integer(62, 4, 0x10) + string(b"9"),
    ],
    "eviction": [BIG[0], BIG[1], indexed(63), indexed(63), BIG[2], indexed(63)],
    "oversize insertion": [A1, FIRST, OVERSIZE, b"", C3, FIRST],
    "size 0 and back": [A1, FIRST, C3, FIRST, size_update(0) + size_update(4096), A1, FIRST],
    "the same size": [A1, FIRST, size_update(4096), FIRST, FIRST],
    "a smaller size that evicts": [A1, B2, indexed(63), size_update(40), FIRST, C3, FIRST],
    "duplicates": [A1, A1, indexed(63), B2, indexed(63), indexed(64)],
    "nothing of the table": [b"", A1, b"", B2, b"", plain(b"q", b"1"), plain(b"q", b"1")],
}


def placed(atoms: bytes) -> tuple[bytes, bytes]:
    """Split ``atoms`` into the size updates before the first field, and the rest."""
    at = 0
    while at < len(atoms) and atoms[at] & 0xE0 == 0x20:
        at += 1
        if atoms[at - 1] & 0x1F == 0x1F:
            while atoms[at] & 0x80:
                at += 1
            at += 1
    return atoms[:at], atoms[at:]


def replay(oracle: Oracle, name: str) -> None:
    for atoms in REPLAYS[name]:
        update, rest = placed(atoms)
        oracle.call(rest, update + REQUEST)
    oracle.peer.assert_alive()
