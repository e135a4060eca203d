"""A worker counts on its own page, and the master reads it. No other process can change the page once the worker has
mapped it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from mmap import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.leftovers import nothing_left

from definition_server.ipc.stats import (
    LATENCY_BOUNDS,
    METHODS,
    REFUSALS,
    SLOT_SIZE,
    STATUSES,
    Room,
    Slot,
    StatsPage,
    Word,
    map_own,
    map_peer,
    unshared_slot,
)


@pytest.fixture
def page() -> Iterator[StatsPage]:
    page = StatsPage()
    yield page
    page.close()


@pytest.fixture
def slot(page: StatsPage) -> Slot:
    """The page as its worker writes it."""
    return map_own(os.dup(page.descriptor))


def buckets(slot: Slot, method: str) -> dict[float | None, int]:
    """Upper bound (None: above all) → count, of the buckets that are not empty."""
    counts = slot.read().latency[method]
    return {bound: count for bound, count in zip((*LATENCY_BOUNDS, None), counts, strict=True) if count}


# -- layout ------------------------------------------------------------------------------------------------------------


def test_a_page_holds_every_word() -> None:
    assert SLOT_SIZE == Word.END * 8
    # Nine single words and a hash of four; one for each status, method, bucket of a method, and reason.
    words = 9 + 4 + len(STATUSES) + len(METHODS) * (1 + len(LATENCY_BOUNDS) + 1) + len(REFUSALS)
    assert words == Word.END


def test_no_two_values_of_a_page_share_a_word(slot: Slot) -> None:
    """Each word is written with its own value, and all values are read back."""
    slot.start(pid=1001, now_ns=1002)
    slot.serve(generation=1003, entries=1004, version_hash=bytes(range(1, 33)))
    slot.connected(1005, 1006)
    slot.lines_dropped(1007)
    slot.start_accepting()
    slot.set_room(Room.TAKEN)
    for reason in range(len(REFUSALS)):
        for _ in range(reason + 4):
            slot.refused(reason)
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
    assert reading.lines_dropped == 1007
    assert reading.room == Room.TAKEN
    assert list(reading.refused.values()) == [4, 5, 6, 7]
    assert reading.version_hash == bytes(range(1, 33)).hex()
    first = sum(range(1, len(STATUSES) + 1))  # counted above at 0 ns, under the first method
    expected = {method: [10 * (n + 1) + i for i in range(len(LATENCY_BOUNDS) + 1)] for n, method in enumerate(METHODS)}
    expected[METHODS[0]][0] += first
    assert {method: list(counts) for method, counts in reading.latency.items()} == expected
    times = [round(bound * 1e9) for bound in (*LATENCY_BOUNDS, 2.0)]
    nanoseconds = [sum((10 * (n + 1) + i) * each for i, each in enumerate(times)) for n in range(len(METHODS))]
    assert [round(seconds * 1e9) for seconds in reading.latency_sum_seconds.values()] == nanoseconds
    total = sum(sum(counts) for counts in expected.values())
    assert reading.requests == {s: i + 1 if i else total - first + 1 for i, s in enumerate(STATUSES)}


# -- counting ----------------------------------------------------------------------------------------------------------


def test_a_new_page_has_every_status_and_method_at_zero(page: StatsPage) -> None:
    reading = page.read()
    assert reading.requests == {"200": 0, "400": 0, "401": 0, "404": 0, "500": 0, "503": 0}
    assert reading.latency == dict.fromkeys(("GetCommand", "SyncCatalog"), (0,) * (len(LATENCY_BOUNDS) + 1))
    assert reading.latency_sum_seconds == {"GetCommand": 0, "SyncCatalog": 0}
    assert (reading.pid, reading.heartbeat_ns, reading.generation, reading.entries) == (0, 0, 0, 0)
    assert reading.version_hash == ""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("status", STATUSES)
def test_a_request_is_counted_under_its_status_and_its_method(
    page: StatsPage, slot: Slot, method: str, status: str
) -> None:
    slot.count(METHODS.index(method), STATUSES.index(status), 1_500_000_000)
    reading = page.read()
    assert {name: count for name, count in reading.requests.items() if count} == {status: 1}
    assert {name: sum(counts) for name, counts in reading.latency.items() if sum(counts)} == {method: 1}
    assert {name: total for name, total in reading.latency_sum_seconds.items() if total} == {method: 1.5}


@pytest.mark.parametrize("bound", LATENCY_BOUNDS)
def test_a_bucket_includes_its_upper_bound_and_nothing_above(slot: Slot, bound: float) -> None:
    """As Prometheus defines ``le``."""
    nanoseconds = round(bound * 1e9)
    following = (*LATENCY_BOUNDS, None)[LATENCY_BOUNDS.index(bound) + 1]
    slot.count(0, 0, nanoseconds)
    assert buckets(slot, METHODS[0]) == {bound: 1}
    slot.count(0, 0, nanoseconds + 1)
    assert buckets(slot, METHODS[0]) == {bound: 1, following: 1}


def test_the_shortest_and_the_longest_times_have_a_bucket(slot: Slot) -> None:
    slot.count(1, 0, 0)
    slot.count(1, 0, 86_400 * 10**9)
    assert buckets(slot, METHODS[1]) == {LATENCY_BOUNDS[0]: 1, None: 1}
    assert slot.read().latency_sum_seconds[METHODS[1]] == 86_400


@given(
    st.lists(st.tuples(st.sampled_from(range(2)), st.sampled_from(range(6)), st.integers(0, 2 * 10**9)), max_size=50)
)
def test_any_requests_add_up(requests: list[tuple[int, int, int]]) -> None:
    slot = unshared_slot()
    for request in requests:
        slot.count(*request)
    reading = slot.read()
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


# -- the state of a worker ---------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32).filter(any))
def test_the_version_hash_is_read_back_as_hex(version_hash: bytes) -> None:
    slot = unshared_slot()
    slot.serve(1, 2, version_hash)
    assert slot.read().version_hash == version_hash.hex()


@given(st.integers(0, 10_000), st.integers(0, len(STATUSES) - 1), st.integers(0, 10**10))
def test_count_many_equals_as_many_single_counts(number: int, status: int, elapsed_ns: int) -> None:
    at_once, one_by_one = unshared_slot(), unshared_slot()
    at_once.count_many(1, status, number, elapsed_ns)
    for _ in range(number):
        one_by_one.count(1, status, elapsed_ns)
    assert at_once.read() == one_by_one.read()


def test_a_beat_changes_only_the_heartbeat(page: StatsPage, slot: Slot) -> None:
    slot.start(10, 100)
    before = os.pread(page.descriptor, SLOT_SIZE, 0)
    slot.beat(2**40)
    assert slot.read().heartbeat_ns == 2**40
    slot.beat(100)
    assert os.pread(page.descriptor, SLOT_SIZE, 0) == before


# -- sharing -----------------------------------------------------------------------------------------------------------


COUNTING = """
import os, sys, signal
from definition_server.ipc.stats import map_own
slot = map_own(int(sys.argv[1]))
slot.start(os.getpid(), 77)
slot.serve(4, 30, bytes(range(32)))
for _ in range(1000):
    slot.count(1, 4, 10)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_counts_of_a_killed_process_are_read(page: StatsPage) -> None:
    command = [sys.executable, "-c", COUNTING, str(page.descriptor)]
    with subprocess.Popen(command, pass_fds=(page.descriptor,)) as process:
        assert process.wait(60) == -signal.SIGKILL
    reading = page.read()
    assert reading.pid == process.pid
    assert reading.requests["500"] == reading.latency["SyncCatalog"][0] == 1000
    assert (reading.generation, reading.entries, reading.heartbeat_ns) == (4, 30, 77)
    assert reading.version_hash == bytes(range(32)).hex()


def test_a_peer_reads_the_counts_that_a_worker_writes(page: StatsPage, slot: Slot) -> None:
    page.seal()
    peer = map_peer(os.dup(page.descriptor))
    slot.connected(3, 5)
    slot.beat(9)
    assert peer.load() == (False, 3, 5, 9)
    with pytest.raises(TypeError):
        peer.beat(1)


@pytest.mark.parametrize("accepting", [True, False])
def test_a_page_shows_peers_whether_its_worker_accepts_how_much_it_holds_and_when_its_loop_last_ran(
    accepting: bool,
) -> None:
    slot = unshared_slot()
    if accepting:
        slot.start_accepting()
    slot.connected(3, 5)
    slot.connected(2, 4)
    slot.beat(11)
    assert slot.load() == (accepting, 2, 9, 11)
    assert slot.read().accepting is accepting


@pytest.mark.parametrize(("word", "room"), [(0, Room.FREE), (1, Room.FULL), (2, Room.TAKEN), (2**64 - 1, Room.TAKEN)])
def test_any_value_that_a_worker_writes_is_read_as_one_of_three_states_of_room(word: int, room: Room) -> None:
    slot = unshared_slot()
    slot._words[Word.ROOM] = word
    assert slot.read().room is room


@pytest.mark.parametrize("word", [2, 2**64 - 1])
def test_a_worker_accepts_only_if_the_written_value_is_one(word: int) -> None:
    slot = unshared_slot()
    slot._words[Word.ACCEPTING] = word
    assert slot.load()[0] is False
    assert slot.read().accepting is False


def test_a_page_that_is_too_short_is_not_mapped_and_leaves_no_descriptor() -> None:
    with nothing_left():
        for map_page in (map_own, map_peer):
            with pytest.raises(ValueError):  # noqa: PT011 - of the module mmap
                map_page(os.memfd_create("short"))


def test_a_page_that_cannot_be_made_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with nothing_left():
        monkeypatch.setattr(fcntl, "fcntl", refuse)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            StatsPage()
        monkeypatch.undo()


def test_a_page_cannot_be_resized(page: StatsPage) -> None:
    for size in (0, SLOT_SIZE // 2, SLOT_SIZE * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(page.descriptor, size)


def test_once_sealed_only_the_worker_that_mapped_the_page_can_write_it(page: StatsPage, slot: Slot) -> None:
    page.seal()
    again = os.open(f"/proc/self/fd/{page.descriptor}", os.O_RDWR)
    for descriptor in (page.descriptor, again):
        with pytest.raises(PermissionError):
            mmap(descriptor, SLOT_SIZE)
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 0)
    os.close(again)
    slot.count(0, 0, 1)
    assert page.read().requests["200"] == 1


def test_the_master_cannot_seal_a_page_on_which_its_worker_has_forbidden_seals(page: StatsPage, slot: Slot) -> None:
    fcntl.fcntl(page.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    with pytest.raises(PermissionError):
        page.seal()
    assert slot.read() == page.read()


def test_a_mapping_outlives_the_pages_descriptor_and_leaves_nothing() -> None:
    with nothing_left():
        page = StatsPage()
        slot = map_own(os.dup(page.descriptor))
        page.close()
        slot.count(0, 0, 1)
        assert slot.read().requests["200"] == 1
        del page, slot


def test_a_child_inherits_the_page_only_if_it_is_passed(page: StatsPage) -> None:
    assert os.get_inheritable(page.descriptor) is False


def test_a_worker_that_drains_is_read_as_accepting_no_more() -> None:
    slot = unshared_slot()
    slot.start_accepting()
    assert slot.read().accepting
    slot.stop_accepting()
    assert not slot.read().accepting
