"""The calls of a generator are drawn beforehand, in the shares that the scenario states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hpack.hpack import Decoder
from perf.generator.job import WRONG_KEY, Job
from perf.targets.catalogue import Catalogue, name_of
from tests.support import wire

COUNT = 2000


@pytest.fixture(scope="module")
def catalogue() -> Iterator[Catalogue]:
    made = Catalogue(COUNT, 300)
    yield made
    made.close()


def job(**fields: Any) -> Job:
    return Job("closed", 1, key="right", **fields)


def asked(made: list[Any]) -> Counter[str]:
    return Counter(call.request[7:].decode() for call in made)


def test_names_all_requests_every_definition_in_turn(catalogue: Catalogue) -> None:
    calls = job().calls(catalogue.snapshot)
    assert [call.request[7:].decode() for call in calls] == [name_of(number) for number in range(COUNT)]
    assert all(call.content == catalogue.snapshot.answer(call.request[7:]) for call in calls)


def test_names_one_requests_a_single_definition(catalogue: Catalogue) -> None:
    assert asked(job(names="one").calls(catalogue.snapshot)) == {name_of(0): 1}


def test_spread_selects_names_from_the_whole_catalogue(catalogue: Catalogue) -> None:
    assert sorted(asked(job(spread=4).calls(catalogue.snapshot))) == [
        name_of(number) for number in (0, 500, 1000, 1500)
    ]


def test_the_shares_of_a_mix_are_kept(catalogue: Catalogue) -> None:
    calls = job(names="zipf", unknown=0.01, bad_key=0.001).calls(catalogue.snapshot)
    shares = {status: count / len(calls) for status, count in Counter(call.status for call in calls).items()}
    assert shares == pytest.approx({0: 0.989, 5: 0.01, 16: 0.001}, abs=1e-4)
    # The calls are mixed and not in blocks, so every part has about its share.
    assert all(5 < sum(call.status == 5 for call in calls[at : at + 2000]) < 45 for at in range(0, 100_000, 2000))


def test_zipf_requests_a_few_definitions_often_and_all_sometimes(catalogue: Catalogue) -> None:
    counts = asked(job(names="zipf").calls(catalogue.snapshot)).most_common()
    assert len(counts) > 0.99 * COUNT
    assert counts[0][1] / counts[1][1] == pytest.approx(2**1.1, rel=0.1)
    assert sum(count for _, count in counts[:20]) > 0.4 * sum(count for _, count in counts)
    assert counts[0][0] != name_of(0)


def test_processes_prefer_the_same_definitions_but_draw_different_calls(catalogue: Catalogue) -> None:
    first, second = (job(names="zipf", member=number).calls(catalogue.snapshot) for number in (0, 1))
    assert asked(first).most_common(1)[0][0] == asked(second).most_common(1)[0][0]
    assert [call.request for call in first[:50]] != [call.request for call in second[:50]]


def test_a_call_for_an_unknown_name_expects_its_own_answer(catalogue: Catalogue) -> None:
    calls = job(unknown=1.0, unknown_names=3).calls(catalogue.snapshot)
    assert set(asked(calls)) == {"missing00000", "missing00001", "missing00002"}
    assert calls[0].content == f"Command '{calls[0].request[7:].decode()}' not found".encode()


def keys(block: bytes) -> list[str]:
    return [value for name, value in Decoder().decode(block) if name == "x-avap-auth"]


def test_a_wrong_key_among_right_ones_has_its_own_header_block(catalogue: Catalogue) -> None:
    mixed = job(bad_key=0.5)
    calls = mixed.calls(catalogue.snapshot)
    assert {tuple(keys(call.block)) for call in calls if call.status == 16} == {(WRONG_KEY,)}
    assert not any(call.block for call in calls if call.status == 0)
    assert keys(next(iter(mixed.blocks()))[0]) == ["right"]


def test_the_usual_header_block_has_the_wrong_key_if_all_keys_are_wrong(catalogue: Catalogue) -> None:
    flood = job(bad_key=1.0)
    assert {(call.status, call.block) for call in flood.calls(catalogue.snapshot)} == {(16, b"")}
    assert keys(next(iter(flood.blocks()))[0]) == [WRONG_KEY]


def test_every_header_block_with_a_deadline_decodes_to_its_fields() -> None:
    fresh = job(deadlines=500)
    fresh.blocks().check(wire.deadlines(500))
