"""The stats page is one memory for all processes: the master reads what a worker counts in its slot, and nothing else
changes. The counts of a worker that has ended stay. Every slot has cache lines of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.leftovers import nothing_left

from definition_server.ipc.stats import LATENCY_BOUNDS, METHODS, SLOT_SIZE, STATUSES, Slot, StatsPage, Word

CACHE_LINE = 64


@pytest.fixture
def page() -> Iterator[StatsPage]:
    """A page of three slots."""
    page = StatsPage.create(3)
    yield page
    page.close()


def buckets(slot: Slot, method: str) -> dict[float | None, int]:
    """Upper bound (None: above all) → count, of the buckets that are not empty."""
    counts = slot.read().latency[method]
    return {bound: count for bound, count in zip((*LATENCY_BOUNDS, None), counts, strict=True) if count}


# -- layout ------------------------------------------------------------------------------------------------------------


def test_every_slot_has_cache_lines_of_its_own() -> None:
    assert SLOT_SIZE % CACHE_LINE == 0
    assert Word.END * 8 <= SLOT_SIZE < Word.END * 8 + CACHE_LINE


def test_a_page_holds_the_slots_it_was_made_for() -> None:
    for count in (1, 3, 512):
        with closing(StatsPage.create(count)) as page:
            assert page.slots == count
            assert os.fstat(page.descriptor).st_size == count * SLOT_SIZE


def test_no_two_values_of_a_slot_share_a_word(page: StatsPage) -> None:
    """Each is written with a value of its own, and all are read back as written."""
    slot = page.slot(1)
    slot.start(pid=1001, now_ns=1002)
    slot.serve(generation=1003, entries=1004, version_hash=bytes(range(1, 33)))
    slot.connected(1005, 1006)
    slot.start_accepting()
    for i in range(len(STATUSES)):
        for _ in range(i + 1):
            slot.count(0, i, 0)
    for method in range(len(METHODS)):
        for i, bound in enumerate((*LATENCY_BOUNDS, 2.0)):
            for _ in range(10 * (method + 1) + i):
                slot.count(method, 0, round(bound * 1e9))
    reading = slot.read()
    assert (reading.pid, reading.heartbeat_ns, reading.generation, reading.entries) == (1001, 1002, 1003, 1004)
    assert (reading.accepting, reading.connections, reading.opened) == (True, 1005, 1006)
    assert reading.version_hash == bytes(range(1, 33)).hex()
    first = sum(range(1, len(STATUSES) + 1))  # counted above at 0 ns, under the first method
    expected = {method: [10 * (n + 1) + i for i in range(len(LATENCY_BOUNDS) + 1)] for n, method in enumerate(METHODS)}
    expected[METHODS[0]][0] += first
    assert {method: list(counts) for method, counts in reading.latency.items()} == expected
    total = sum(sum(counts) for counts in expected.values())
    assert reading.requests == {s: i + 1 if i else total - first + 1 for i, s in enumerate(STATUSES)}


def test_a_slot_never_touches_its_neighbours(page: StatsPage) -> None:
    before = [page.slot(number).read() for number in range(3)]
    slot = page.slot(1)
    slot.start(2**64 - 1, 2**64 - 1)
    slot.serve(2**64 - 1, 2**64 - 1, b"\xff" * 32)
    for method in range(len(METHODS)):
        for status in range(len(STATUSES)):
            slot.count(method, status, 2**60)
    assert [page.slot(0).read(), page.slot(2).read()] == [before[0], before[2]]
    content = os.pread(page.descriptor, 3 * SLOT_SIZE, 0)
    assert content[:SLOT_SIZE] == content[2 * SLOT_SIZE :] == bytes(SLOT_SIZE)


# -- counting ----------------------------------------------------------------------------------------------------------


def test_a_new_slot_has_every_status_and_method_at_zero(page: StatsPage) -> None:
    reading = page.slot(0).read()
    assert reading.requests == {"200": 0, "400": 0, "401": 0, "404": 0, "500": 0, "503": 0}
    assert reading.latency == dict.fromkeys(("GetCommand", "SyncCatalog"), (0,) * (len(LATENCY_BOUNDS) + 1))
    assert reading.latency_sum_seconds == {"GetCommand": 0, "SyncCatalog": 0}
    assert (reading.pid, reading.heartbeat_ns, reading.generation, reading.entries) == (0, 0, 0, 0)
    assert reading.version_hash == ""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("status", STATUSES)
def test_a_request_is_counted_under_its_status_and_its_method(page: StatsPage, method: str, status: str) -> None:
    page.slot(0).count(METHODS.index(method), STATUSES.index(status), 1_500_000_000)
    reading = page.slot(0).read()
    assert {name: count for name, count in reading.requests.items() if count} == {status: 1}
    assert {name: sum(counts) for name, counts in reading.latency.items() if sum(counts)} == {method: 1}
    assert {name: total for name, total in reading.latency_sum_seconds.items() if total} == {method: 1.5}


@pytest.mark.parametrize("bound", LATENCY_BOUNDS)
def test_a_bucket_includes_its_upper_bound_and_nothing_above(page: StatsPage, bound: float) -> None:
    """As Prometheus defines ``le``."""
    nanoseconds = round(bound * 1e9)
    slot, following = page.slot(0), (*LATENCY_BOUNDS, None)[LATENCY_BOUNDS.index(bound) + 1]
    slot.count(0, 0, nanoseconds)
    assert buckets(slot, METHODS[0]) == {bound: 1}
    slot.count(0, 0, nanoseconds + 1)
    assert buckets(slot, METHODS[0]) == {bound: 1, following: 1}


def test_the_shortest_and_the_longest_times_have_a_bucket(page: StatsPage) -> None:
    slot = page.slot(0)
    slot.count(1, 0, 0)
    slot.count(1, 0, 86_400 * 10**9)
    assert buckets(slot, METHODS[1]) == {LATENCY_BOUNDS[0]: 1, None: 1}
    assert slot.read().latency_sum_seconds[METHODS[1]] == 86_400


@given(
    st.lists(st.tuples(st.sampled_from(range(2)), st.sampled_from(range(6)), st.integers(0, 2 * 10**9)), max_size=50)
)
def test_any_requests_add_up(requests: list[tuple[int, int, int]]) -> None:
    with closing(StatsPage.create(1)) as page:
        for request in requests:
            page.slot(0).count(*request)
        reading = page.slot(0).read()
    for i, status in enumerate(STATUSES):
        assert reading.requests[status] == sum(request[1] == i for request in requests)
    for i, method in enumerate(METHODS):
        times = [elapsed for number, _, elapsed in requests if number == i]
        assert sum(reading.latency[method]) == len(times)
        assert reading.latency_sum_seconds[method] == sum(times) / 1e9
        for bound, up_to in zip(LATENCY_BOUNDS, cumulated(reading.latency[method]), strict=False):
            assert up_to == sum(elapsed <= bound * 1e9 for elapsed in times)


def cumulated(counts: tuple[int, ...]) -> list[int]:
    return [sum(counts[: end + 1]) for end in range(len(counts))]


# -- what a worker is --------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32).filter(any))
def test_the_version_hash_is_read_back_as_hex(version_hash: bytes) -> None:
    with closing(StatsPage.create(1)) as page:
        page.slot(0).serve(1, 2, version_hash)
        assert page.slot(0).read().version_hash == version_hash.hex()


def test_the_next_worker_of_a_slot_keeps_counters_and_resets_its_state(page: StatsPage) -> None:
    slot = page.slot(0)
    slot.start(pid=10, now_ns=100)
    slot.serve(5, 30, b"\xaa" * 32)
    slot.count(0, 0, 1_000_000_000)
    before = slot.read()
    slot.start(pid=11, now_ns=200)
    after = slot.read()
    assert (after.pid, after.heartbeat_ns) == (11, 200)
    assert (after.generation, after.entries, after.version_hash) == (0, 0, "")
    assert after.requests == before.requests
    assert after.latency == before.latency
    assert after.latency_sum_seconds == before.latency_sum_seconds == {"GetCommand": 1.0, "SyncCatalog": 0.0}


def test_the_next_worker_of_a_slot_begins_without_connections_and_not_accepting(page: StatsPage) -> None:
    slot = page.slot(0)
    slot.start(pid=10, now_ns=100)
    slot.start_accepting()
    slot.connected(5, 8)
    slot.start(pid=11, now_ns=200)
    assert slot.load() == (False, 0, 8, 200)
    slot.connected(1, 1)
    assert slot.read().opened == 9, "the total of accepted connections continues"


@given(st.integers(0, 10_000), st.integers(0, len(STATUSES) - 1), st.integers(0, 10**10))
def test_count_many_equals_as_many_single_counts(number: int, status: int, elapsed_ns: int) -> None:
    with closing(StatsPage.create(2)) as page:
        at_once, one_by_one = page.slot(0), page.slot(1)
        at_once.count_many(1, status, number, elapsed_ns)
        for _ in range(number):
            one_by_one.count(1, status, elapsed_ns)
        assert at_once.read() == one_by_one.read()


def test_a_beat_changes_only_the_heartbeat(page: StatsPage) -> None:
    slot = page.slot(0)
    slot.start(10, 100)
    before = os.pread(page.descriptor, SLOT_SIZE, 0)
    slot.beat(2**40)
    assert slot.read().heartbeat_ns == 2**40
    slot.beat(100)
    assert os.pread(page.descriptor, SLOT_SIZE, 0) == before


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_a_second_mapping_sees_what_the_first_counts(page: StatsPage) -> None:
    with closing(StatsPage(os.dup(page.descriptor))) as other:
        assert other.slots == page.slots
        page.slot(2).count(0, 3, 10)
        other.slot(2).count(0, 3, 10)
        assert page.slot(2).read() == other.slot(2).read()
        assert page.slot(2).read().requests["404"] == 2


COUNTING = """
import os, sys, signal
from definition_server.ipc.stats import StatsPage
slot = StatsPage(int(sys.argv[1])).slot(1)
slot.start(os.getpid(), 77)
slot.serve(4, 30, bytes(range(32)))
for _ in range(1000):
    slot.count(1, 4, 10)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_counts_of_a_killed_process_stay(page: StatsPage) -> None:
    for rounds in (1, 2):
        command = [sys.executable, "-c", COUNTING, str(page.descriptor)]
        with subprocess.Popen(command, pass_fds=(page.descriptor,)) as process:
            assert process.wait(60) == -signal.SIGKILL
        reading = page.slot(1).read()
        assert reading.pid == process.pid
        assert reading.requests["500"] == 1000 * rounds
        assert reading.latency["SyncCatalog"][0] == 1000 * rounds
    assert (reading.generation, reading.entries, reading.heartbeat_ns) == (4, 30, 77)
    assert reading.version_hash == bytes(range(32)).hex()


def test_slots_outlive_the_pages_descriptor_and_are_then_unmapped() -> None:
    with nothing_left():
        page = StatsPage.create(1)
        slot = page.slot(0)
        page.close()
        slot.count(0, 0, 1)
        assert slot.read().requests["200"] == 1
        del page, slot


def test_a_child_inherits_the_page_only_if_it_is_passed() -> None:
    with closing(StatsPage.create(1)) as page:
        assert os.get_inheritable(page.descriptor) is False
