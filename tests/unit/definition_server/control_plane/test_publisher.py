"""One publication at a time: the publisher owns its descriptor, its memory is sealed, and listeners can read it."""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from dataclasses import replace

import pytest
from tests.support.leftovers import descriptors_before, open_descriptors
from tests.support.snapshots import built, published

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.layout import Footer, SnapshotError
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.publisher import (
    Publication,
    Publisher,
    prepare,
    to_shared_memory,
)
from definition_server.control_plane.resident_memory import give_back_heap
from definition_server.ipc.memory import SEALS

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def is_open(descriptor: int) -> bool:
    return descriptor in open_descriptors()


# -- descriptors -----------------------------------------------------------------------------------------------------


def test_a_hundred_publications_hold_no_more_descriptors_than_one(publisher: Publisher) -> None:
    publisher.publish(published("if"))
    before = len(open_descriptors())
    for generation in range(2, 102):
        publisher.publish(published("if", generation=generation))
    assert len(open_descriptors()) == before


def test_close_closes_every_descriptor() -> None:
    before = descriptors_before()
    publisher = Publisher()
    publisher.publish(published("if"))
    publisher.close()
    assert publisher.current is None
    assert open_descriptors() == before


def test_a_catalogue_that_was_built_long_ago_is_published_now(publisher: Publisher) -> None:
    assert publisher.published_at is None
    before = time.time()
    publisher.publish(published("if"))
    assert publisher.published_at is not None
    assert before <= publisher.published_at <= time.time()


def test_close_may_be_called_twice_or_without_a_publication(publisher: Publisher) -> None:
    publisher.close()
    publisher.close()


def test_memory_that_holds_no_snapshot_is_closed() -> None:
    before = descriptors_before()
    wrong = replace(built("if"), pieces=[b"no snapshot at all" * 100])
    with pytest.raises(SnapshotError):
        to_shared_memory(wrong)
    assert open_descriptors() == before


def test_a_snapshot_in_use_survives_its_publication(publisher: Publisher) -> None:
    publisher.publish(published("if"))
    assert publisher.current is not None
    held = publisher.current.snapshot
    publisher.publish(published("else", generation=2))
    assert [definition.name for definition in held] == ["if"]
    held.verify()


# -- sealed ----------------------------------------------------------------------------------------------------------


def test_published_memory_cannot_be_changed_by_anyone(publisher: Publisher) -> None:
    publisher.publish(published("if"))
    assert publisher.current is not None
    descriptor = publisher.current.descriptor
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, publisher.current.snapshot.size + 1)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0)


def test_shared_memory_holds_the_built_snapshot() -> None:
    snapshot = built("if", "else")
    publication = to_shared_memory(snapshot)
    os.close(publication.descriptor)
    assert bytes(publication.snapshot.buffer) == snapshot.to_bytes()


def build_in_shared_memory(builder: SnapshotBuilder, newest: Footer | None, **of: int) -> Publication | None:
    write = prepare(builder, newest, **of)
    return None if write is None else write()


def collected(*codes: bytes, ids: int = 1) -> SnapshotBuilder:
    builder = SnapshotBuilder()
    builder.add(Row(ids + n, b"command%d" % n, None, None, code, range=0) for n, code in enumerate(codes))
    return builder


@pytest.mark.parametrize("short", [0, 1 << 20], ids=["hashed beside writing", "hashed before"])
def test_a_snapshot_hashed_while_it_is_written_equals_one_that_is_hashed_before(
    short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("definition_server.control_plane.publisher._SHORT_OCTETS", short)
    monkeypatch.setattr("definition_server.control_plane.publisher._RELEASED_CHUNKS", 1)
    monkeypatch.setattr("definition_server.catalog.assembly._CHUNK_OCTETS", 1000)
    codes = [b"a", b"long" * 30_000, b"b", *(b"c" * n for n in range(100))]
    expected = collected(*codes).build(generation=7, created_at_ns=9)
    first = build_in_shared_memory(collected(*codes), None, generation=7, created_at_ns=9)
    assert first is not None
    assert bytes(first.snapshot.buffer) == expected.to_bytes()
    first.snapshot.verify()
    # The next build copies unchanged definitions from the memory of this snapshot, and gives back its pages while it
    # copies.
    builder = collected(*codes)
    builder.build(generation=7, created_at_ns=9)
    previous = builder.as_previous(first.snapshot)
    assert previous is not None
    again = SnapshotBuilder()
    again.take_over(previous, previous.ranges)
    again.add([Row(999, b"more", None, None, b"code", range=1)])
    release, released = Snapshot.release_pages, list[Snapshot]()
    monkeypatch.setattr(Snapshot, "release_pages", lambda each: (released.append(each), release(each)))
    second = build_in_shared_memory(again, first.snapshot.footer, generation=8, created_at_ns=9)
    assert second is not None
    if not short:
        assert len(released) > 100, "after each chunk"
    second.snapshot.verify()
    assert second.snapshot.count == first.snapshot.count + 1
    for publication in (first, second):
        os.close(publication.descriptor)


def test_a_build_of_the_same_octets_is_not_written_again_unless_ids_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("definition_server.control_plane.publisher._SHORT_OCTETS", 0)
    known = collected(b"a", b"b").build(generation=1, created_at_ns=9).footer
    assert build_in_shared_memory(collected(b"a", b"b"), known, generation=2, created_at_ns=10) is None
    other = build_in_shared_memory(collected(b"a", b"b", ids=5), known, generation=2, created_at_ns=10)
    assert other is not None
    assert other.snapshot.version_hash == known.version_hash.hex()
    other.snapshot.verify()
    os.close(other.descriptor)


def test_pages_that_were_given_back_can_be_read_again() -> None:
    publication = published(*(f"command{n}" for n in range(100)))
    os.close(publication.descriptor)
    before = bytes(publication.snapshot.buffer)
    publication.snapshot.release_pages()
    assert bytes(publication.snapshot.buffer) == before
    give_back_heap()


# -- listeners -------------------------------------------------------------------------------------------------------


def test_generations_count_from_one_and_continue_from_the_served_one(publisher: Publisher) -> None:
    assert publisher.next_generation == 1
    publisher.publish(published("if", generation=41))
    assert publisher.next_generation == 42


def test_every_listener_is_called_with_the_current_and_open_publication(publisher: Publisher) -> None:
    told: list[tuple[str, int, bool, bool]] = []

    def listener(name: str, publication: Publication) -> None:
        generation = publication.snapshot.generation
        told.append((name, generation, publication is publisher.current, is_open(publication.descriptor)))

    publisher.on_publish(lambda publication: listener("first", publication))
    publisher.on_publish(lambda publication: listener("second", publication))
    publisher.publish(published("if"))
    publisher.publish(published("if", generation=2))
    assert told == [(name, generation, True, True) for generation in (1, 2) for name in ("first", "second")]
