"""The catalogue that is served, its generation and key, and the log lines about it."""

from __future__ import annotations

import pytest
from tests.support.logs import LogLines, logged
from tests.support.snapshots import row
from tests.unit.definition_server.control_plane.publication_server import ALL, FEW, HoldingGate, Server, change

from definition_server.catalog.signing import Signer
from definition_server.control_plane import served_catalogue
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.sync_state import Outcome
from definition_server.observability.reasons import Reason

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def rotate(server: Server, key: str) -> Signer:
    server.signer = Signer(key)
    server.synchronizer.use_signer(server.signer)
    return server.signer


async def test_the_served_catalogue_is_signed_once_with_a_new_key_if_the_table_cannot_be_read(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    version = server.version
    signer = rotate(server, "key")
    for _ in range(2):
        server.source.fail(SourceError("down"))
        assert await server.cycle() is Outcome.FAILED
    assert server.served.footer.key_id == signer.key_id
    assert (server.version, server.generations) == (version, [1, 2])
    (line,) = logged(logs, "Served catalogue is signed again", log_level="info")
    assert (line["version_hash"], line["generation"]) == (version, 2)
    assert not logged(logs, "Another catalogue is served")
    catalogue = server.synchronizer.catalogue
    assert catalogue.newest is catalogue.served, "the newest catalogue has the new signature too"
    stored = await catalogue.disk.load_version(version, signer)
    assert stored is not None, "and its file in the history has the new MAC"
    del stored


async def test_a_rotated_key_is_used_by_the_next_reading_or_by_follow(server: Server, logs: LogLines) -> None:
    """`follow` before a reading does not sign again, because the reading publishes the catalogue anyway."""
    await server.cycle()
    rotate(server, "key")
    assert await server.synchronizer.catalogue.follow(sign_again=False) is False
    assert server.generations == [1]
    assert await server.synchronizer.catalogue.follow() is True
    assert server.generations == [1, 2]
    assert await server.synchronizer.catalogue.follow() is False


async def test_generations_rise_with_each_pin_unpin_acceptance_and_change(server: Server) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    await server.publications.pin(old, None)
    await server.publications.unpin()
    await server.cycle(*FEW)
    await server.publications.accept(server.held)
    assert server.generations == [1, 2, 3, 4, 5]
    await server.written()
    server.restart()
    assert await server.synchronizer.restore()
    assert server.generations == [5], "the generation of the stored catalogue"
    await change(server, "newer")
    assert server.generations == [5, 6]


async def test_a_stored_catalogue_is_restored_once_and_logged_with_its_age_and_the_reason(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    version = server.version
    server.restart()
    server.clock.advance(90.26)
    server.source.fail(SourceError("no route", Reason.DATABASE_UNREACHABLE))
    await server.cycle()
    assert await server.synchronizer.restore() is True
    assert await server.synchronizer.restore() is False
    (line,) = logged(logs, "Serving the last-known-good snapshot", log_level="warning")
    assert (line["reason"], line["age_seconds"], line["count"]) == ("no route", 91.3, len(ALL))
    assert (line["version_hash"], line["generation"]) == (version, 1)
    assert server.synchronizer.state.restored_age_seconds == pytest.approx(91.26)
    server.clock.advance(-1000.0)
    server.restart()
    assert await server.synchronizer.restore() is True
    assert server.synchronizer.state.restored_age_seconds == 0.0, "the age is 0 if the clock was set back"
    assert logged(logs, "Serving the last-known-good snapshot")[1]["reason"] == "the database has not answered yet"


async def test_nothing_is_restored_if_nothing_is_stored(server: Server, diskless: Server) -> None:
    for each in (server, diskless):
        assert await each.synchronizer.restore() is False
        assert each.publisher.current is None
        assert each.synchronizer.state.restored_age_seconds is None


async def test_a_cycle_without_changes_publishes_nothing_and_notes_fewer_held_rows(
    server: Server,
) -> None:
    gate = HoldingGate()
    server.options = {"gate": gate}
    server.restart()
    gate.names = frozenset((b"c00", b"c01", b"c02"))
    await server.cycle()
    wishes = server.synchronizer.catalogue._wishes
    assert wishes.rows_held_in(server.version) == 3
    gate.names = frozenset((b"c00",))
    assert await server.cycle(*ALL) is Outcome.UNCHANGED
    assert wishes.rows_held_in(server.version) == 1
    assert server.generations == [1]


@pytest.mark.parametrize("rows", [ALL, FEW], ids=["published", "held"])
async def test_each_cycle_gives_back_the_memory_of_the_newest_catalogue(
    server: Server, rows: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        served_catalogue, "give_back", lambda snapshot, *, heap: given.append((snapshot.version_hash, heap))
    )
    await server.cycle()
    version = server.version
    await server.synchronizer.catalogue.in_background(lambda: None)
    assert given == [(version, True), (version, False)], "after the whole was encoded, the heap, too"
    given.clear()
    await server.cycle(*rows)
    await server.synchronizer.catalogue.in_background(lambda: None)
    assert given == [(version, False)]


async def test_a_published_catalogue_is_known_and_its_changes_are_noted(diskless: Server) -> None:
    await diskless.cycle()
    first = diskless.version
    second = await change(diskless, "new")
    changes = diskless.synchronizer.state.changes
    assert (changes[first].added, changes[first].generation) == (len(ALL), 1)
    assert (changes[second].added, changes[second].changed, changes[second].examples) == (0, 1, ("~ c00",))
    assert diskless.synchronizer.catalogue.knows(first)
    assert await diskless.cycle(row("c00"), *ALL[1:]) is Outcome.PUBLISHED
    assert list(changes) == [second, first], "the version that was published last is at the end"


async def test_an_accepted_version_that_is_no_longer_held_is_published_after_a_restart(server: Server) -> None:
    await server.cycle()
    assert await server.cycle(*FEW) is Outcome.HELD
    held = server.held
    await server.cycle(*ALL)
    await server.synchronizer.catalogue.accept(held)
    assert server.served.count == len(ALL)
    await server.written()
    server.restart()
    assert await server.cycle(*FEW) is Outcome.PUBLISHED
