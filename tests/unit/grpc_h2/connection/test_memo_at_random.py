"""The memo of decoded header blocks on random blocks, and with decoders that break one of its rules.

The static method under test answers with the metadata that it sees, so that a wrong header list shows in the answer;
the oracle is the independent `hpack` library, which decodes every block.
"""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.h2_oracle import A1, FIRST, OVERSIZE, REPLAYS, REQUEST, Oracle, placed, replay
from tests.support.h2_wire import (
    indexed,
    inserting,
    integer,
    plain,
    size_update,
    string,
)
from tests.support.hypothesis_profiles import examples

from grpc_h2.connection import headers as module
from grpc_h2.wire import hpack as engine_hpack

# --- at random, and mutants -------------------------------------------------------------------------------------------

_NAMES = st.sampled_from([b"a", b"b", b"c"])
_VALUES = st.sampled_from([b"1", b"2", b"3", b"w" * 1300])
_ATOM = st.one_of(
    st.builds(inserting, _NAMES, _VALUES),
    st.builds(plain, _NAMES, _VALUES),
    st.integers(0, 3).map(lambda n: ("entry", n)),
    st.tuples(st.just("named"), st.integers(0, 3), _VALUES),
    st.just(inserting(b"o", b"v" * 5000)),
)
_BLOCK = st.tuples(st.lists(st.sampled_from([0, 50, 100, 4096]), max_size=2), st.lists(_ATOM, max_size=3))


def _concrete(oracle: Oracle, updates: list[int], atoms: list[object]) -> tuple[bytes, bytes]:
    """Size updates and fields of a block whose references exist in the library's table."""
    front = b"".join(map(size_update, updates))
    probe = hpack.Decoder()
    probe.header_table.maxsize = oracle.decoder.header_table.maxsize
    probe.header_table.dynamic_entries = oracle.decoder.header_table.dynamic_entries.copy()
    probe.header_table._current_size = oracle.decoder.header_table._current_size
    probe.decode(front + REQUEST)
    out = b""
    for atom in atoms:
        octets = atom
        if isinstance(atom, tuple):
            present = len(probe.header_table.dynamic_entries)
            if atom[1] >= present:
                continue
            index = 62 + atom[1]
            octets = indexed(index) if atom[0] == "entry" else integer(index, 6, 0x40) + string(atom[2])
        assert isinstance(octets, bytes)
        probe.decode(octets)
        out += octets
    return front, out


@pytest.mark.requirement("D1", "D2")
@settings(max_examples=examples(150))
@given(st.lists(_BLOCK, min_size=1, max_size=8), st.lists(st.integers(0, 7), max_size=20))
def test_random_blocks_in_random_order_are_decoded_as_by_the_reference(
    blocks: list[tuple[list[int], list[object]]], order: list[int]
):
    oracle = Oracle()
    for number in [*range(len(blocks)), *(index % len(blocks) for index in order)]:
        front, atoms = _concrete(oracle, *blocks[number])
        oracle.call(atoms, front + REQUEST)


class NeverChanged(engine_hpack.Decoder):
    """A mutant: no block seems to change the table."""

    __slots__ = ()

    @property
    def changed(self) -> bool:
        return False

    @changed.setter
    def changed(self, value: bool) -> None:
        pass


class StandingEpoch(engine_hpack.Decoder):
    """A mutant: the epoch never advances."""

    __slots__ = ()

    @property
    def epoch(self) -> int:
        return 0

    @epoch.setter
    def epoch(self, value: int) -> None:
        pass


@pytest.mark.interpreted
@pytest.mark.requirement("D1", "D2")
@pytest.mark.parametrize("mutant", [NeverChanged, StandingEpoch])
def test_a_decoder_without_either_rule_of_the_memo_fails_the_replays(
    monkeypatch: pytest.MonkeyPatch, mutant: type[engine_hpack.Decoder]
):
    monkeypatch.setattr(module, "Decoder", mutant)
    caught = set()
    for name in REPLAYS:
        try:
            replay(Oracle(), name)
        except AssertionError:
            caught.add(name)
    assert caught, "no replay detects this fault of the decoder"
    if mutant is StandingEpoch:
        assert {"insertion", "eviction", "a smaller size that evicts"} <= caught


def _blind_to(unseen: str) -> type[engine_hpack.Decoder]:
    """A decoder whose epoch does not count one kind of change."""

    class Blind(engine_hpack.Decoder):
        __slots__ = ()

        def decode_some(self, octets: bytes, most: int) -> tuple[tuple[bytes, bytes], ...] | None:
            before = self.epoch
            fields = super().decode_some(octets, most)
            assert fields is not None, "the blocks of this test have few fields"
            size_update_in_front = octets[0] & 0xE0 == 0x20
            oversize = any(len(name) + len(value) + 32 > 4096 for name, value in fields)
            if (unseen == "size update" and size_update_in_front) or (unseen == "oversize insertion" and oversize):
                self.epoch = before
            return fields

    return Blind


@pytest.mark.requirement("D2")
@pytest.mark.parametrize(
    ("unseen", "emptying"), [("size update", size_update(0) + size_update(4096)), ("oversize insertion", OVERSIZE)]
)
@pytest.mark.parametrize("blind", [False, pytest.param(True, marks=pytest.mark.interpreted)])
def test_a_memo_that_misses_one_kind_of_change_gives_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, unseen: str, emptying: bytes, blind: bool
):
    if blind:
        monkeypatch.setattr(module, "Decoder", _blind_to(unseen))
    oracle = Oracle()
    for atoms in (A1, FIRST, FIRST):
        oracle.call(atoms)
    update, rest = placed(emptying)
    oracle.call(rest, update + REQUEST)
    if blind:
        with pytest.raises(AssertionError):
            oracle.assert_out_of_step(FIRST)
    else:
        oracle.assert_out_of_step(FIRST)
