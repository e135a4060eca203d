"""A pin is in effect until its end, also after restarts. At its end, the newest catalogue is served."""

from __future__ import annotations

import os

import pytest
from tests.support.logs import LogLines, logged
from tests.support.loop import eventually, promptly
from tests.support.snapshots import row
from tests.unit.definition_server.control_plane.publication_server import (
    ALL,
    FEW,
    Server,
    change,
)

from definition_server.catalog.signing import Signer
from definition_server.control_plane.freshness import RestartReason
from definition_server.control_plane.proof import Proof
from definition_server.control_plane.publications import (
    PublicationError,
)
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.sync_state import Outcome
from definition_server.control_plane.wishes import Pin, Policy, Wishes, WishesFile

pytestmark = pytest.mark.usefixtures("nothing_is_left")


async def test_a_pin_serves_an_old_version_under_a_new_generation_and_the_newest_is_served_when_it_ends(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    server.source.fail(SourceError("down"))
    assert await server.cycle() is Outcome.FAILED
    assert await promptly(server.publications.pin(old[:8], None)) is None
    assert (server.version, server.served.generation) == (old, 3)
    assert logged(logs, "Catalogue pinned", version_hash=old)
    another = "Another catalogue is served"
    assert logged(logs, another, version_hash=old, generation=3, pinned=True, log_level="warning")
    assert await server.cycle(row("c00", "newest"), *ALL[1:]) is Outcome.UNCHANGED
    assert server.version == old
    waiting = server.synchronizer.catalogue.newest
    assert waiting is not None
    newest = waiting.version_hash
    del waiting
    assert logged(logs, "Catalogue waits for the end of the pin", version_hash=newest, count=len(ALL))
    assert await promptly(server.publications.unpin()) is None
    assert server.version == newest != old
    assert server.generations == [1, 2, 3, 4]
    assert logged(logs, another, version_hash=newest, generation=4, instead_of=old, pinned=False)
    with pytest.raises(PublicationError, match="nothing is pinned"):
        await server.publications.unpin()


async def test_a_pin_survives_restarts_without_the_database_and_its_end_serves_the_newest(server: Server) -> None:
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, None)
    newest = await server.cycle(row("c01", "newest"), row("c00", "new"), *ALL[2:])
    assert newest is Outcome.UNCHANGED
    for _ in range(2):
        await server.written()
        server.restart()
        server.source.fail(SourceError("down"))
        await server.cycle()
        assert await server.synchronizer.restore()
        assert server.versions == [old]
        assert server.synchronizer.state.pin is not None
    await server.publications.unpin()
    assert server.version not in (old, new), "the newest that passed the guard, not the catalogue that the pin replaced"
    await server.written()
    server.restart()
    await server.cycle()
    assert old not in server.versions


async def test_a_pinned_version_is_served_without_the_database_even_if_all_newer_ones_are_damaged(
    server: Server,
) -> None:
    assert server.directory is not None
    await server.cycle()
    old = server.version
    await server.publications.pin(old, None)
    for code in ("1", "2", "3"):
        await server.cycle(row("c00", code), *ALL[1:])
        await server.written()
    server.restart()
    stored = [SnapshotStore(server.directory).path, *server.directory.joinpath("history").iterdir()]
    damaged = [path for path in stored if path.is_file() and old not in path.name]
    assert len(damaged) == 4
    for path in damaged:
        octets = bytearray(path.read_bytes())
        octets[100] ^= 1  # listed, because its footer is sound, but refused when it is read
        path.write_bytes(octets)
    server.source.fail(SourceError("down"))
    await server.cycle()
    assert await server.synchronizer.restore()
    assert server.versions == [old]


async def test_a_restart_under_a_pin_with_the_database_up_never_serves_the_table(server: Server) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    await server.publications.pin(old, None)
    await server.written()
    server.restart()
    await server.cycle()
    assert server.versions == [old]


async def test_a_pin_expires_by_itself(server: Server, logs: LogLines) -> None:
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, server.clock.now + 0.05)
    assert server.version == old
    server.clock.advance(0.06)
    await eventually(lambda: server.version == new, "the newest catalogue is served again")
    assert logged(logs, "Pin has ended", version_hash=old)
    assert server.synchronizer.state.pin is None


async def test_a_pin_that_expired_while_the_server_was_down_has_no_effect(server: Server) -> None:
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, server.clock.now + 3600)
    await server.written()
    server.clock.advance(3601)
    server.restart()
    await server.cycle()
    assert server.versions == [new]


async def test_a_pinned_version_that_the_history_has_just_removed_is_added_again(server: Server) -> None:
    server.keep = 1
    server.restart()
    await server.cycle()
    old, catalogue = server.version, server.synchronizer.catalogue
    await server.written()
    pinned = await catalogue.disk.load_version(old, None)
    await change(server, "new")
    await server.written()
    assert catalogue.disk.lacks(old)
    assert await catalogue.pin(Pin(old), pinned) is None
    await server.written()
    assert not catalogue.disk.lacks(old)
    assert server.version == old


async def test_a_catalogue_held_under_a_pin_can_be_accepted_and_is_served_after_the_pin(server: Server) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    await server.publications.pin(old, None)
    assert await server.cycle(*FEW) is Outcome.HELD
    held = server.held
    await server.publications.accept(held)
    assert server.version == old
    await server.publications.unpin()
    assert server.version == held


async def test_a_key_rotated_under_a_pin_signs_the_pinned_catalogue(server: Server) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    await server.publications.pin(old, None)
    server.signer = Signer("key")
    server.synchronizer.use_signer(server.signer)
    await server.cycle()
    assert server.version == old
    definition = server.served.get("c00")
    assert definition is not None
    assert server.signer.unpack(definition.code) == b"pass"
    await server.publications.unpin()
    definition = server.served.get("c00")
    assert definition is not None
    assert server.signer.unpack(definition.code) == b"new"


@pytest.mark.parametrize("database", ["up", "down"])
async def test_after_a_key_rotation_pin_pinned_and_newest_catalogue_on_disk_have_the_new_key(
    server: Server, database: str
) -> None:
    server.signer = Signer("old key")
    server.restart()
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, None)
    await server.written()
    if database == "down":
        server.source.fail(SourceError("down"))
    server.signer = Signer("new key")
    server.synchronizer.use_signer(server.signer)
    for _ in range(2):
        await server.cycle()
    await server.written()
    server.restart()
    server.source.fail(SourceError("down"))
    await server.cycle()
    assert await server.synchronizer.restore()
    assert server.versions == [old]
    await server.publications.unpin()
    assert server.version == new


async def test_older_versions_can_be_pinned_after_rotations_and_a_restart(server: Server) -> None:
    server.signer = Signer("key 0")
    server.restart()
    await server.cycle()
    oldest = server.version
    await change(server, "new")
    newest = await change(server, "newest")
    for number in (1, 2):  # the second one while the first is in progress
        server.signer = Signer(f"key {number}")
        server.synchronizer.use_signer(server.signer)
    await server.cycle()
    await server.written()
    await server.publications.pin(oldest, None)
    definition = server.served.get("c00")
    assert definition is not None
    assert server.signer.unpack(definition.code) == b"pass"
    await server.publications.unpin()
    await server.written()
    server.restart()
    await server.cycle()
    assert server.version == newest
    await server.publications.pin(oldest, None)
    assert server.version == oldest


@pytest.mark.parametrize("key", [None, "our key"], ids=["no key", "key"])
async def test_a_pin_in_an_unsigned_file_is_used_only_if_no_key_is_set(
    server: Server, logs: LogLines, key: str | None
) -> None:
    assert server.directory is not None
    server.signer = None if key is None else Signer(key)
    server.restart()
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.written()
    WishesFile(server.directory).write(Wishes((old,), Pin(old)))
    server.restart()
    await server.cycle()
    assert server.version == (old if key is None else new)
    lines = logged(logs, "Pins and accepted catalogues not read", log_level="error")
    assert [("MAC" in line["error"], "AVAP_INTERNAL_KEY" in line["remedy"]) for line in lines] == (
        [] if key is None else [(True, True)]
    )
    if key is not None:
        await server.publications.pin(new, None)
        await server.written()
        assert server.directory.joinpath("wishes.json.refused").exists(), "the file is kept as evidence"
        server.restart()
        server.source.replace(row("c00", "newest"), *ALL[1:])
        await server.cycle()
        assert server.version == new, "ours counts"


async def test_a_pin_that_a_full_disk_refused_is_stored_while_the_database_is_down(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.directory is not None
    await server.cycle()
    old = server.version
    await change(server, "new")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    server.source.fail(SourceError("down"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert await server.publications.pin(old, None) is not None
        await server.written()
    assert await server.cycle() is Outcome.FAILED
    assert WishesFile(server.directory).read().pinned == Pin(old)
    assert not server.synchronizer.state.pin_unsaved


async def test_a_pin_in_the_policy_takes_effect_in_the_next_cycle_unless_there_is_a_pin_by_command(
    server: Server,
) -> None:
    await server.cycle()
    first = server.version
    second = await change(server, "second")
    third = await change(server, "third")
    server.policy = Policy(pin=Pin(first[:12]))
    server.source.fail(SourceError("down"))
    await server.cycle()
    assert server.version == first
    pin = server.synchronizer.state.pin
    assert pin is not None
    assert pin.source == "policy"
    await server.publications.pin(second, None)
    assert server.version == second
    with pytest.raises(PublicationError, match="PUBLICATION_POLICY"):
        await server.publications.unpin()
    assert server.version == first
    server.policy = Policy()
    await server.cycle()
    assert server.version == third


async def test_a_policy_that_pins_an_unknown_version_is_logged_once_and_the_served_version_stays(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    version = server.version
    server.policy = Policy(pin=Pin("ab" * 32))
    for code in ("new", "newer"):
        assert await server.cycle(row("c00", code), *ALL[1:]) is Outcome.UNCHANGED
    assert server.version == version
    assert len(logged(logs, "Pinned catalogue not served", log_level="error")) == 1
    pin = server.synchronizer.state.pin
    assert pin is not None
    assert pin.missing
    server.policy = Policy()
    assert await server.cycle() is Outcome.UNCHANGED
    assert server.version != version, "the newest"


async def test_a_new_server_under_an_unknown_pin_follows_the_table_until_it_knows_the_version(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    wanted = server.version
    await server.written()
    assert server.directory is not None
    history = server.directory / "history"
    elsewhere = [path.rename(server.directory / path.name) for path in history.iterdir()]
    SnapshotStore(server.directory).path.unlink()
    server.policy = Policy(pin=Pin(wanted[:8]))
    server.source.replace(row("c00", "first"), *ALL[1:])
    server.restart()
    assert await server.cycle() is Outcome.PUBLISHED
    assert await server.cycle(row("c00", "second"), *ALL[1:]) is Outcome.PUBLISHED
    assert len(set(server.versions)) == 2
    pin = server.synchronizer.state.pin
    assert pin is not None
    assert (pin.missing, pin.vain) == (True, True)
    [line] = logged(logs, "Pinned catalogue not served", log_level="error")
    assert line["effect"].startswith("the table is followed")
    for path in elsewhere:
        path.rename(history / path.name)
    await server.synchronizer.catalogue.disk.list_history()
    await server.cycle()
    assert server.version == wanted, "once its version is known, the pin is in effect"
    assert await server.cycle(row("c00", "third"), *ALL[1:]) is Outcome.UNCHANGED
    assert server.version == wanted
    pin = server.synchronizer.state.pin
    assert pin is not None
    assert (pin.missing, pin.vain) == (False, False)


async def test_an_unknown_pin_in_place_of_an_unknown_one_keeps_the_served_version(server: Server) -> None:
    server.policy = Policy(pin=Pin("ab" * 32))
    await server.cycle()
    server.policy = Policy(pin=Pin("cd" * 32))
    version = server.version
    assert await server.cycle(row("c00", "new"), *ALL[1:]) is Outcome.UNCHANGED
    assert server.version == version


@pytest.mark.parametrize("began", ["before anything was served", "on a server that served"])
async def test_a_restart_under_a_pin_of_an_unknown_version_is_safe_if_it_changes_nothing(
    server: Server, began: str
) -> None:
    proof = Proof(server.synchronizer.state, interval=60.0, stores=True, clock=server.clock, now=server.clock)
    server.synchronizer.observer = proof
    unknown = Policy(pin=Pin("ab" * 32))
    server.policy = unknown if began.startswith("before") else Policy()
    await server.cycle()
    server.policy = unknown
    await server.cycle(row("c00", "new"), *ALL[1:])
    proof.tick(published=True, serving=True)
    restart, before = proof.verdict().restart, server.version
    expected = RestartReason.STORED if began.startswith("before") else RestartReason.PIN_NOT_STORED
    assert (restart.safe, restart.reason) == (expected is RestartReason.STORED, expected)
    server.restart()
    await server.cycle()
    assert (server.version == before) == restart.safe, "as the judgement before the restart said"


async def test_a_pin_without_a_directory_is_answered_with_its_duration(
    diskless: Server,
) -> None:
    await diskless.cycle()
    version = diskless.version
    note = await diskless.publications.pin(version, None)
    assert note is not None
    assert "SNAPSHOT_DIR" in note
    await diskless.cycle(row("c00", "new"), *ALL[1:])
    assert diskless.version == version


async def test_a_pin_takes_effect_despite_a_full_disk_and_is_stored_later(
    server: Server, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.cycle()
    version = server.version

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        note = await server.publications.pin(version, None)
        await server.written()
    assert note is not None
    assert "No space left" in note
    assert logged(logs, "Pins and accepted catalogues not stored", log_level="error")
    await server.cycle()
    server.restart()
    await server.cycle(row("c00", "new"), *ALL[1:])
    assert server.versions == [version]
