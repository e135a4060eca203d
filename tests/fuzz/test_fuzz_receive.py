"""Any octets cause no exception, take bounded memory, and have the same outcome in any division into reads.

Seeds are the captures of real clients and the files of `tests/fuzz/corpus` (inputs that once failed, and openings of
attacks). Each run replays every file unchanged. `FUZZ_EXAMPLES` sets the number of mutations; without it, the profile
of Hypothesis sets the number.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.support.h2_peer import GUARDED, HANDLED, REFUSING, STATIC, Peer
from tests.support.h2_replies import Result
from tests.support.h2_wire import (
    ENHANCE_YOUR_CALM,
    FEEDS,
    HELLO,
    PREFACE,
    SETTINGS_ACK,
    STREAM_CLOSED,
    call,
    frame,
    grpc_message,
    indexed,
    inserting,
    request_block,
    split_frames,
)
from tests.support.hypothesis_profiles import examples

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or examples(150))
_TESTS = Path(__file__).parents[1]
SEEDS = {
    path.stem: path.read_bytes()
    for folder in ("data/captures", "fuzz/corpus")
    for path in sorted((_TESTS / folder).glob("*.bin"))
}

MIB = 1024 * 1024


def outcome(peer: Peer) -> dict[str, object]:
    """Everything that the client and the handlers received."""
    events = [
        (type(event).__name__, getattr(getattr(event, "stream", None), "id", None), getattr(event, "message", None))
        for event in peer.events
    ]
    return {"code": peer.code, "terminated": peer.connection.terminated, "events": events, "pongs": peer.replies.pongs}


def settled(result: Result) -> bool:
    return result.ended and result.reset in (None, 0)


def check(octets: bytes) -> None:
    """Feed `octets` in three ways and compare the outcomes."""
    peers = [Peer(feed, hello=None).send(octets) for feed in FEEDS]
    for peer in peers:
        assert peer.connection.terminated == (peer.closing is not None)
        assert peer.closing is None or peer.code is not None
        assert peer.connection.terminated or not peer.connection.backlog
        assert peer.connection.open_calls == len(peer.calls) - len(peer.cancelled)
    first, *others = peers
    for other in others:
        codes = {first.code, other.code}
        if ENHANCE_YOUR_CALM in codes or (len(codes) > 1 and STREAM_CLOSED in codes):
            # The number of PINGs and WINDOW_UPDATEs that the server's answers allow depends on the time of the answers.
            # So does the state of a stream: closed, so that a late frame may end the connection, or only half-closed
            # (section 5.1).
            continue
        assert outcome(other) == outcome(first)
        for stream in first.replies.streams.keys() | other.replies.streams.keys():
            ours, theirs = first.result(stream), other.result(stream)
            if settled(ours) and settled(theirs):
                assert (ours.headers, ours.trailers, ours.body) == (theirs.headers, theirs.trailers, theirs.body)
            elif (
                not settled(ours) and not settled(theirs) and first.code is None and not reset_by_client(octets, stream)
            ):
                assert ours.reset == theirs.reset


def reset_by_client(octets: bytes, stream: int) -> bool:
    # An answer that a reset overtakes is dropped; whether the reset overtakes it depends on how the octets are divided.
    return any(got.kind == 3 and got.stream == stream for got in split_frames(octets.removeprefix(PREFACE))[0])


@pytest.mark.parametrize("name", SEEDS)
def test_a_file_of_the_corpus_has_the_same_outcome_in_any_division(name: str):
    check(SEEDS[name])


# --- mutated captures ----------------------------------------------------------------------------------------

_AT = st.floats(0, 1, exclude_max=True)
_MUTATION = st.one_of(
    st.tuples(st.just("set"), _AT, st.integers(0, 255)),
    st.tuples(st.just("flip"), _AT, st.integers(0, 7)),
    st.tuples(st.just("delete"), _AT, st.integers(1, 40)),
    st.tuples(st.just("insert"), _AT, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("repeat"), _AT, st.integers(1, 200)),
    st.tuples(st.just("cut"), _AT, st.none()),
    st.tuples(st.just("drop frame"), _AT, st.none()),
    st.tuples(st.just("repeat frame"), _AT, st.integers(1, 5)),
    st.tuples(st.just("swap frames"), _AT, st.none()),
    st.tuples(st.just("kind"), _AT, st.integers(0, 12)),
    st.tuples(st.just("flags"), _AT, st.integers(0, 255)),
    st.tuples(st.just("stream"), _AT, st.integers(0, 30)),
)


def mutate(octets: bytes, mutations: list[tuple[str, float, object]]) -> bytes:
    for what, where, how in mutations:
        octets = _mutated(octets, what, where, how)
    return octets


def _mutated(octets: bytes, what: str, where: float, how: object) -> bytes:
    if not octets:
        return octets
    at = int(where * len(octets))
    match what, how:
        case "set", int(value):
            return octets[:at] + bytes((value,)) + octets[at + 1 :]
        case "flip", int(bit):
            return octets[:at] + bytes((octets[at] ^ 1 << bit,)) + octets[at + 1 :]
        case "delete", int(size):
            return octets[:at] + octets[at + size :]
        case "insert", bytes(more):
            return octets[:at] + more + octets[at:]
        case "repeat", int(size):
            return octets[: at + size] + octets[at:]
        case "cut", _:
            return octets[:at]
    frames, rest = split_frames(octets.removeprefix(PREFACE))
    if not frames:
        return octets
    parts = [frame(got.kind, got.flags, got.stream, got.payload) for got in frames]
    number = int(where * len(parts))
    got = frames[number]
    match what, how:
        case "drop frame", _:
            del parts[number]
        case "repeat frame", int(times):
            parts[number] *= times + 1
        case "swap frames", _:
            parts[number - 1], parts[number] = parts[number], parts[number - 1]
        case "kind", int(kind):
            parts[number] = frame(kind, got.flags, got.stream, got.payload)
        case "flags", int(flags):
            parts[number] = frame(got.kind, flags, got.stream, got.payload)
        case "stream", int(stream):
            parts[number] = frame(got.kind, got.flags, stream, got.payload)
    return PREFACE + b"".join(parts) + rest


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SEEDS)), st.lists(_MUTATION, min_size=1, max_size=6))
def test_a_mutated_capture_has_the_same_outcome_in_any_division(name: str, mutations: list[tuple[str, float, object]]):
    check(mutate(SEEDS[name], mutations))


# --- random frames -------------------------------------------------------------------------------------------

_BLOCKS = st.sampled_from(
    [
        request_block(STATIC),
        request_block(REFUSING),
        request_block(GUARDED),
        request_block(HANDLED),
        request_block(STATIC, content_length=b"10"),
        request_block(HANDLED, grpc_encoding=b"gzip"),
        request_block(STATIC, grpc_timeout=b"1S"),
        request_block(method=b"GET"),
        request_block(STATIC) + inserting(b"a", b"b"),
        request_block(HANDLED) + indexed(62),
        inserting(b"only", b"trailers"),
        b"",
        b"\x20",
        b"\x80",
    ]
)
_BODIES = st.one_of(
    st.sampled_from([grpc_message(b"world"), grpc_message(b"x", 1), grpc_message(b""), b"\0\0", b""]),
    st.binary(max_size=30),
)
_STREAMS = st.sampled_from([0, 1, 1, 1, 3, 3, 5, 7, 2, 2**31 - 1])
_KINDS = st.sampled_from([0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
_FLAGS = st.sampled_from([0, 1, 4, 5, 8, 0x24, 0x2D, 0xFF, 4, 5])
_PAYLOADS = st.one_of(
    _BLOCKS, _BODIES, st.sampled_from([bytes(4), bytes(5), bytes(6), bytes(8), b"\0\0\0\x05", b"\0\4\0\0\0\0"])
)


@st.composite
def _frames(draw: st.DrawFn) -> bytes:
    kind = draw(_KINDS)
    payload = draw({0: _BODIES, 1: _BLOCKS, 9: _BLOCKS}.get(kind, _PAYLOADS))
    return frame(kind, draw(_FLAGS), draw(_STREAMS), payload)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_frames(), max_size=12))
def test_random_frames_have_the_same_outcome_in_any_division(frames: list[bytes]):
    check(HELLO + SETTINGS_ACK + b"".join(frames))


@settings(max_examples=EXAMPLES, deadline=None)
@example(b"")
@given(st.binary(max_size=300))
def test_random_octets_have_the_same_outcome_in_any_division(octets: bytes):
    check(octets)
    check(PREFACE + octets)
    check(HELLO + call(1) + octets)


# --- memory --------------------------------------------------------------------------------------------------


def test_many_broken_connections_take_bounded_memory():
    draw = random.Random(20)
    names = sorted(SEEDS)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(300):
            octets = bytearray(SEEDS[draw.choice(names)])
            for _ in range(draw.randrange(1, 8)):
                octets[draw.randrange(24, len(octets))] = draw.randrange(256)
            Peer(hello=None).send(bytes(octets))
        grown, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 8 * MIB
    assert grown - before < 2 * MIB
