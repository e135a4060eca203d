"""Large answers under random windows, settings, resets, changes of the data and of the keys, compared with the same
answers cut stream by stream: the octets are equal, and within every window."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import h2_wire as wire
from tests.support.h2_peer import GUARDED, STATIC, Peer
from tests.support.hypothesis_profiles import examples

from grpc_h2.connection.limits import Limits
from grpc_h2.rpc.requests import Metadata
from grpc_h2.static.answers import LARGEST_FRAMED, StaticAnswer
from grpc_h2.static.routes import Router

MEMORY = memoryview(bytes(number * number % 251 for number in range(LARGEST_FRAMED + 100)))
SIZES = (10, 16_379, 16_380, 32_763, 65_530, 65_531, 100_000, LARGEST_FRAMED - 5, LARGEST_FRAMED - 4)
WINDOWS = (2**24, 0, 16_384, 65_535, 200_000)
INCREMENTS = (1, 16_384, 60_000, 400_000)


class World:
    """A client whose server keeps large answers in frames, or, if ``cut``, in no frames."""

    def __init__(self, *, cut: bool) -> None:
        self.cut = cut
        self.version = 0
        self.admitted = True
        self.router = Router()
        self.methods = [
            self.router.add_static_unary(STATIC.decode(), self.lookup),
            self.router.add_static_unary(GUARDED.decode(), self.lookup, self.authorize),
        ]
        self.peer = Peer(router=self.router, limits=Limits(free_window_updates=1000, max_ping_strikes=1000))
        self.waiting: dict[int, tuple[bytes, int]] = {}
        """Calls of which only HEADERS were sent: path and size."""
        self.expected: dict[int, bytes | None] = {}
        """Stream → its message; None: it is refused."""
        self.reset: set[int] = set()
        self.last = -1

    def lookup(self, message: bytes) -> StaticAnswer:
        answer = StaticAnswer.unary(self.message(int(message)), metadata=(("version", str(self.version)),))
        answer.lasting = not self.cut  # an answer that does not last is not framed
        return answer

    def message(self, size: int) -> memoryview:
        return MEMORY[self.version :][:size]

    def authorize(self, metadata: Metadata) -> StaticAnswer | None:
        return None if self.admitted else StaticAnswer.failure(16, "no")

    # -- what happens ---------------------------------------------------------------------------------------------

    def ask(self, calls: list[tuple[bytes, int]]) -> None:
        """Calls in one read."""
        octets = b""
        for path, size in calls:
            self.last += 2
            octets += wire.call(self.last, path, b"%d" % size)
            self.expect(self.last, path, size)
        self.peer.send(octets)

    def begin(self, path: bytes, size: int) -> None:
        """The HEADERS of a call."""
        self.last += 2
        self.waiting[self.last] = path, size
        self.peer.send(wire.headers(self.last, wire.request_block(path)))
        if path == GUARDED and not self.admitted:
            self.expected[self.last] = None
            del self.waiting[self.last]

    def finish(self) -> None:
        """The DATA of all calls that wait for it."""
        octets = b""
        for stream, (path, size) in self.waiting.items():
            octets += wire.data(stream, wire.grpc_message(b"%d" % size), end_stream=True)
            self.expect(stream, path, size)
        self.waiting.clear()
        self.peer.send(octets)

    def expect(self, stream: int, path: bytes, size: int) -> None:
        refused = path == GUARDED and not self.admitted
        self.expected[stream] = None if refused else bytes(self.message(size))

    def open(self, windows: list[tuple[bool, int]]) -> None:
        """WINDOW_UPDATEs of the connection, or of the newest stream."""
        used = max(self.last, 1)
        self.peer.send(*[wire.window_update(0 if whole or self.last < 0 else used, size) for whole, size in windows])

    def set(self, window: int, frame: int) -> None:
        self.peer.send(wire.settings((wire.INITIAL_WINDOW_SIZE, window), (wire.MAX_FRAME_SIZE, frame)))

    def cancel(self) -> None:
        """Reset the newest stream."""
        if self.last > 0 and self.last not in self.reset:
            self.waiting.pop(self.last, None)
            self.reset.add(self.last)
            self.peer.send(wire.rst_stream(self.last), wire.ping())

    def change(self, prepared: bool) -> None:
        """The data changes, with prepared answers or without."""
        self.version += 1
        for method in self.methods:
            if prepared:
                preparation = method.prepare(self.lookup)
                list(preparation.steps())
                preparation.install()
                list(method.release())
            else:
                method.forget()

    def rotate(self) -> None:
        """The keys change. Calls that wait are refused, or not, by the new ones."""
        self.admitted = not self.admitted
        self.router.forget_authorizations()
        self.peer.send(wire.ping())
        if not self.admitted:
            for stream in [each for each, (path, _) in self.waiting.items() if path == GUARDED]:
                self.expected[stream] = None
                del self.waiting[stream]

    def end(self) -> list[Any]:
        """Open all windows. Returns what each stream got."""
        self.finish()
        self.peer.send(wire.settings((wire.INITIAL_WINDOW_SIZE, 2**30)), wire.window_update(0, 2**30))
        assert self.peer.code is None
        got: list[Any] = []
        for stream, message in self.expected.items():
            result = self.peer.result(stream)
            if stream in self.reset:
                got.append("reset")
                continue
            assert result.ended
            assert result.status == (16 if message is None else 0)
            same = result.messages == ([] if message is None else [message])
            assert same, f"stream {stream} has other octets"
            assert not self.peer.connection._outbound.unsent
            got.append((result.headers, result.trailers))
        return got


PATHS = st.sampled_from((STATIC, STATIC, GUARDED))
CALLS = st.tuples(PATHS, st.sampled_from(SIZES))
STEPS = st.one_of(
    st.tuples(st.just("ask"), st.lists(CALLS, min_size=1, max_size=4)),
    st.tuples(st.just("ask"), st.lists(CALLS, min_size=1, max_size=4)),
    st.tuples(st.just("begin"), PATHS, st.sampled_from(SIZES)),
    st.tuples(st.just("finish")),
    st.tuples(st.just("open"), st.lists(st.tuples(st.booleans(), st.sampled_from(INCREMENTS)), min_size=1, max_size=2)),
    st.tuples(st.just("set"), st.sampled_from(WINDOWS), st.sampled_from((16_384, 20_000, 65_536, 2**24 - 1))),
    st.tuples(st.just("cancel")),
    st.tuples(st.just("change"), st.booleans()),
    st.tuples(st.just("rotate")),
)


@pytest.mark.requirement("A20", "D7")
@settings(max_examples=examples(400))
@given(st.sampled_from((0, 100_000, 2**24, 2**24)), st.sampled_from(WINDOWS), st.lists(STEPS, min_size=3, max_size=25))
def test_answers_in_frames_equal_answers_that_are_cut_for_each_stream(
    added: int, window: int, steps: list[tuple[Any, ...]]
) -> None:
    worlds = World(cut=False), World(cut=True)
    for step in [("open", [(True, added)] if added else []), ("set", window, 16_384), *steps]:
        name, *arguments = step
        for world in worlds:
            getattr(world, name)(*arguments)
    framed, cut = (world.end() for world in worlds)
    assert framed == cut
