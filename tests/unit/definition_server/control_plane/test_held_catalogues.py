"""A catalogue that looks like an accident is held, also across a restart. Once it is accepted, it is published without
the database."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.logs import LogLines, logged
from tests.support.loop import promptly
from tests.support.snapshots import row
from tests.unit.definition_server.control_plane.publication_server import (
    ALL,
    FEW,
    HELD,
    HoldingGate,
    Server,
    change,
)

from definition_server.catalog.definition import Row
from definition_server.catalog.guard import Thresholds
from definition_server.catalog.signing import Signer
from definition_server.control_plane import catalogue_guard
from definition_server.control_plane.publications import (
    UnknownVersion,
)
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.sync_state import Outcome
from definition_server.control_plane.wishes import Policy
from definition_server.observability.reasons import Reason

pytestmark = pytest.mark.usefixtures("nothing_is_left")


async def test_a_mass_delete_is_held_in_the_cycle_that_reads_it_and_in_each_later_one(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    good = server.version
    assert await server.cycle(*FEW) is Outcome.HELD
    assert server.version == good
    (line,) = logged(logs, HELD, log_level="error")
    assert line["version_hash"] == server.held
    assert server.held[:8] in line["remedy"]
    assert line["commands"] == tuple(f"c{number:02}" for number in range(4, 14))
    assert line["reason"] is Reason.CATALOGUE_SHRUNK
    state = server.synchronizer.state
    since = state.held and state.held.since
    rows = server.source.rows_given
    assert await server.cycle() is Outcome.HELD
    assert state.last_reason is Reason.CATALOGUE_SHRUNK
    assert state.held
    assert state.held.since == since
    assert server.source.rows_given == rows, "an unchanged table is not read again"
    assert len(logged(logs, HELD)) == 2


async def test_a_mass_delete_is_held_across_a_restart_and_the_stored_catalogue_served(server: Server) -> None:
    await server.cycle()
    good = server.version
    server.source.replace(*FEW)
    server.restart()
    assert await server.cycle() is Outcome.HELD
    assert server.versions == []
    assert await server.synchronizer.restore()
    assert server.versions == [good]
    assert await server.cycle() is Outcome.HELD
    await server.publications.accept(server.held[:8])
    assert server.served.count == 4


@pytest.mark.parametrize("file", ["missing", "damaged"])
async def test_the_history_replaces_an_unusable_last_known_good_file(server: Server, file: str) -> None:
    await server.cycle()
    await change(server, "new")
    newest = server.version
    path = SnapshotStore(server.directory or Path()).path
    path.unlink() if file == "missing" else path.write_bytes(b"x" * 500)
    server.source.replace(*FEW)
    server.restart()
    assert await server.cycle() is Outcome.HELD
    assert await server.synchronizer.restore()
    assert server.version == newest


async def test_an_accepted_catalogue_is_published_at_once_without_the_database(server: Server) -> None:
    await server.cycle()
    await server.cycle(*FEW)
    server.source.fail(SourceError("down"))
    assert await server.cycle() is Outcome.FAILED
    held = server.held
    await promptly(server.publications.accept(held))
    assert (server.version, server.served.generation) == (held, 2)
    assert server.synchronizer.state.held is None
    assert server.syncs == 1, "a cycle finds out whether the table still has that content"
    await server.written()
    server.restart()
    assert await server.synchronizer.restore()
    assert server.version == held


async def test_an_accepted_hash_applies_to_one_publication(server: Server) -> None:
    server.options = {"limits": Thresholds()}
    await server.cycle()
    await server.cycle()
    emptied = await server.cycle(Row(1, None, None, None, b"x"))
    assert emptied is Outcome.HELD
    await server.publications.accept(server.held)
    assert server.served.count == 0
    await server.cycle(*ALL)
    assert server.served.count == 40
    assert await server.cycle(Row(1, None, None, None, b"x")) is Outcome.HELD, "each time"


@pytest.mark.parametrize("down", [False, True], ids=["database up", "database down"])
async def test_a_hash_in_the_policy_releases_the_held_catalogue_in_the_next_cycle(server: Server, down: bool) -> None:
    await server.cycle()
    await server.cycle(*FEW)
    server.policy = Policy(accept=(server.held[:16],))
    if down:
        server.source.fail(SourceError("down"))
    assert await server.cycle() is (Outcome.FAILED if down else Outcome.PUBLISHED)
    assert server.served.count == 4


async def test_a_catalogue_whose_hash_the_policy_accepts_in_advance_is_not_held(server: Server) -> None:
    await server.cycle()
    await server.cycle(*FEW)
    server.policy = Policy(accept=(server.held,))
    server.restart()
    assert await server.cycle() is Outcome.PUBLISHED


async def test_a_mended_table_is_served_in_the_next_cycle_and_the_held_one_forgotten(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    good = server.version
    await server.cycle(*FEW)
    held = server.held
    assert await server.cycle(*ALL) is Outcome.UNCHANGED
    assert server.synchronizer.state.held is None
    assert server.version == good
    assert logged(logs, "Catalogue no longer held", version_hash=held)
    with pytest.raises(UnknownVersion, match="No catalogue is held now"):
        await server.publications.accept(held)


@pytest.mark.parametrize("with_disk", [True, False], ids=["history", "this run"])
async def test_the_exact_return_to_an_earlier_version_is_never_held(
    server: Server, diskless: Server, with_disk: bool
) -> None:
    server = server if with_disk else diskless
    await server.cycle()
    doubled = [row(f"big{number}", "x" * 200_000) for number in range(20)]
    assert await server.cycle(*ALL, *doubled) is Outcome.HELD
    await server.publications.accept(server.held)
    if with_disk:
        await server.written()
        server.restart()
        assert await server.synchronizer.restore()
    server.source.replace(*FEW)
    assert await server.cycle() is Outcome.HELD, "this version was never published"
    assert await server.cycle(*ALL) is Outcome.PUBLISHED


async def test_without_a_disk_the_versions_that_were_served_since_the_start_are_known(diskless: Server) -> None:
    catalogue = diskless.synchronizer.catalogue
    await diskless.cycle()
    first = diskless.version
    second = await change(diskless, "new")
    assert catalogue.knows(first)
    assert catalogue.knows(second)
    assert not catalogue.knows("ab" * 32)
    for number in range(2):
        catalogue._note_version(f"v{number}")
    catalogue._note_version(first)
    assert list(catalogue._versions) == [second, "v0", "v1", first]
    for number in range(997):
        catalogue._note_version(f"w{number}")
    assert len(catalogue._versions) == 1000
    assert not catalogue.knows(second), "the oldest is forgotten"
    assert catalogue.knows("v0")


async def test_the_newest_catalogue_is_signed_again_only_once_after_a_change_of_the_key(server: Server) -> None:
    catalogue = server.synchronizer.catalogue
    assert await catalogue.last_good() is None
    await server.cycle()
    newest = await catalogue.last_good()
    assert newest is catalogue.newest
    catalogue._signer = Signer("key")
    again = await catalogue.last_good()
    assert again is not None
    assert again is not newest
    assert again.footer.key_id == Signer("key").key_id
    assert (again.version_hash, again.generation) == (server.version, server.served.generation)
    assert await catalogue.last_good() is again
    del newest, again


async def test_gradual_losses_are_held_once_they_add_up_within_the_window(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(f"c{number:03}") for number in range(200)]
    await server.cycle(*rows)
    assert await server.cycle(*rows[:165]) is Outcome.PUBLISHED
    assert await server.cycle(*rows[:137]) is Outcome.HELD
    assert await server.cycle(*rows[:160]) is Outcome.PUBLISHED, "five commands"
    monkeypatch.setattr(catalogue_guard, "WINDOW_SECONDS", -1.0)
    assert await server.cycle(*rows[:129]) is Outcome.PUBLISHED, "an old baseline is not used"


async def test_a_change_of_the_signing_key_is_not_a_change_of_the_content(server: Server) -> None:
    await server.cycle()
    version = server.version
    server.signer = Signer("key")
    server.synchronizer.use_signer(server.signer)
    assert await server.cycle() is Outcome.PUBLISHED
    assert server.version == version


async def test_while_a_catalogue_is_held_the_served_one_is_signed_with_a_rotated_key(server: Server) -> None:
    await server.cycle()
    good = server.version
    await server.cycle(*FEW)
    server.signer = Signer("key")
    server.synchronizer.use_signer(server.signer)
    assert await server.cycle() is Outcome.HELD
    assert server.version == good
    code = server.served.get("c00")
    assert code is not None
    assert server.signer.unpack(code.code) == b"pass"
    await server.publications.accept(server.held)
    code = server.served.get("c00")
    assert code is not None
    assert server.signer.unpack(code.code) == b"pass"


async def test_a_catalogue_with_many_newly_held_rows_is_held_and_after_its_acceptance_the_next_change_passes(
    server: Server,
) -> None:
    gate = HoldingGate()
    server.options = {"gate": gate}
    server.restart()
    await server.cycle()
    first = server.version
    gate.names = frozenset(b"c%02d" % number for number in range(12))
    assert await server.cycle(row("c39", "new"), *ALL[:39]) is Outcome.HELD
    assert server.synchronizer.state.last_reason is Reason.TOO_MANY_ROWS_HELD
    await server.publications.accept(server.held)
    assert await server.cycle(row("c39", "newer"), *ALL[:39]) is Outcome.PUBLISHED
    server.source.replace(row("c39", "newest"), *ALL[:39])
    await server.written()
    server.restart()
    assert await server.cycle() is Outcome.PUBLISHED, "the number of held rows is known after a restart"
    assert gate.last_good[:2] == [None, first]
    assert gate.last_good[-1] is not None, "the stored catalogue is served"
