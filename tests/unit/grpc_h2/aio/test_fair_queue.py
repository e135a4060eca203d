"""The networks of peers take turns, and none is locked out."""

from __future__ import annotations

from collections import Counter

import pytest

from grpc_h2.aio.fair_queue import FairQueue


class Queue:
    """A `FairQueue` whose pieces of work are names."""

    def __init__(self) -> None:
        self.queue = FairQueue()

    def put(self, network: str, *names: str) -> None:
        for name in names:
            self.queue.put(network, lambda name=name: name)

    def take(self, count: int) -> list[object]:
        return [self.queue.take()() for _ in range(count)]


def test_work_of_one_network_is_taken_first_come_first_served() -> None:
    queue = Queue()
    queue.put("a", "1", "2", "3")
    assert queue.take(3) == ["1", "2", "3"]
    assert not queue.queue


def test_networks_take_turns_even_if_one_has_much_more_work() -> None:
    queue = Queue()
    queue.put("crowd", *(f"c{number}" for number in range(100)))
    queue.put("a", "a1", "a2")
    queue.put("b", "b1")
    assert queue.take(6) == ["c0", "c1", "a1", "c2", "b1", "a2"]


@pytest.mark.parametrize("networks", [1, 64])
def test_a_new_network_waits_for_one_piece_of_work_at_most(networks: int) -> None:
    queue = Queue()
    for number in range(networks):
        queue.put(str(number), *["crowd"] * 100)
    queue.take(2 * networks)
    for waited in range(10):
        queue.take(waited)
        queue.put(f"new {waited}", "new")
        assert "new" in queue.take(2)


def test_a_network_that_returns_for_each_piece_of_work_is_not_new_each_time() -> None:
    queue = Queue()
    queue.put("patient", *["patient"] * 1000)
    queue.put("hasty", "hasty")
    taken: Counter[object] = Counter()
    for _ in range(100):
        (name,) = queue.take(1)
        taken[name] += 1
        if name == "hasty":
            queue.put("hasty", "hasty")
    assert abs(taken["hasty"] - taken["patient"]) <= 2


def test_networks_that_are_all_new_do_not_lock_out_those_that_wait() -> None:
    queue = Queue()
    queue.put("old", *["old"] * 100)
    queue.take(1)
    taken: Counter[object] = Counter()
    for number in range(100):
        for more in range(2):
            queue.put(f"{number}.{more}", "new", "again")
        taken.update(queue.take(1))
    assert taken["new"] == 50, "every second piece"
    assert taken["old"] >= 2


def test_a_queue_without_work_stores_nothing() -> None:
    queue = Queue()
    for number in range(50):
        queue.put(str(number % 7), "x")
    queue.take(50)
    assert len(queue.queue) == 0
    assert not queue.queue._waiting
    assert not queue.queue._new
    assert not queue.queue._served
    with pytest.raises(IndexError):
        queue.queue.take()


def test_every_piece_of_work_is_taken_once() -> None:
    queue, put = Queue(), []
    for number in range(500):
        name = f"{number}"
        queue.put(str(number * number % 23), name)
        put.append(name)
        if number % 5 == 4:
            for taken in queue.take(3):
                put.remove(str(taken))
    assert sorted(map(str, queue.take(len(queue.queue)))) == sorted(put)
