"""The calls that a generator makes are drawn beforehand, in the shares that a scenario asks for."""

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


def test_all_are_asked_for_in_turn(catalogue: Catalogue) -> None:
    calls = job().calls(catalogue.snapshot)
    assert [call.request[7:].decode() for call in calls] == [name_of(number) for number in range(COUNT)]
    assert all(call.content == catalogue.snapshot.answer(call.request[7:]) for call in calls)


def test_one_is_one(catalogue: Catalogue) -> None:
    assert asked(job(names="one").calls(catalogue.snapshot)) == {name_of(0): 1}


def test_a_spread_is_a_sample_of_the_whole_catalogue(catalogue: Catalogue) -> None:
    assert sorted(asked(job(spread=4).calls(catalogue.snapshot))) == [
        name_of(number) for number in (0, 500, 1000, 1500)
    ]


def test_the_shares_of_a_mix_are_kept(catalogue: Catalogue) -> None:
    calls = job(names="zipf", unknown=0.01, bad_key=0.001).calls(catalogue.snapshot)
    shares = {status: count / len(calls) for status, count in Counter(call.status for call in calls).items()}
    assert shares == pytest.approx({0: 0.989, 5: 0.01, 16: 0.001}, abs=1e-4)
    # Mixed, not in blocks: every stretch has about its share.
    assert all(5 < sum(call.status == 5 for call in calls[at : at + 2000]) < 45 for at in range(0, 100_000, 2000))


def test_by_zipf_s_law_few_are_asked_for_often_and_all_sometimes(catalogue: Catalogue) -> None:
    counts = asked(job(names="zipf").calls(catalogue.snapshot)).most_common()
    assert len(counts) > 0.99 * COUNT
    assert counts[0][1] / counts[1][1] == pytest.approx(2**1.1, rel=0.1)
    assert sum(count for _, count in counts[:20]) > 0.4 * sum(count for _, count in counts)
    assert counts[0][0] != name_of(0)


def test_processes_agree_on_what_is_popular_and_draw_for_themselves(catalogue: Catalogue) -> None:
    first, second = (job(names="zipf", member=number).calls(catalogue.snapshot) for number in (0, 1))
    assert asked(first).most_common(1)[0][0] == asked(second).most_common(1)[0][0]
    assert [call.request for call in first[:50]] != [call.request for call in second[:50]]


def test_unknown_names_have_an_answer_of_their_own(catalogue: Catalogue) -> None:
    calls = job(unknown=1.0, unknown_names=3).calls(catalogue.snapshot)
    assert set(asked(calls)) == {"missing00000", "missing00001", "missing00002"}
    assert calls[0].content == f"Command '{calls[0].request[7:].decode()}' not found".encode()


def keys(block: bytes) -> list[str]:
    return [value for name, value in Decoder().decode(block) if name == "x-avap-auth"]


def test_a_wrong_key_in_a_mix_is_in_a_header_block_of_its_own(catalogue: Catalogue) -> None:
    mixed = job(bad_key=0.5)
    calls = mixed.calls(catalogue.snapshot)
    assert {tuple(keys(call.block)) for call in calls if call.status == 16} == {(WRONG_KEY,)}
    assert not any(call.block for call in calls if call.status == 0)
    assert keys(next(iter(mixed.blocks()))[0]) == ["right"]


def test_where_all_keys_are_wrong_it_is_the_usual_block(catalogue: Catalogue) -> None:
    flood = job(bad_key=1.0)
    assert {(call.status, call.block) for call in flood.calls(catalogue.snapshot)} == {(16, b"")}
    assert keys(next(iter(flood.blocks()))[0]) == [WRONG_KEY]


def test_every_call_with_a_deadline_means_what_it_should() -> None:
    fresh = job(deadlines=500)
    fresh.blocks().check(wire.deadlines(500))
