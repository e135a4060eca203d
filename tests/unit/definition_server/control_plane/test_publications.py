"""The operator's commands for catalogues: versions are named, listed, compared and exported without the database."""

from __future__ import annotations

import pytest
from tests.support.snapshots import row
from tests.unit.definition_server.control_plane.publication_server import (
    ALL,
    FEW,
    Server,
    change,
)

from definition_server.control_plane.publications import (
    InvalidRequest,
    PublicationError,
    UnknownVersion,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.parametrize("version", ["", "abc", "a" * 65, "A" * 64, "zz" * 16, "../etc", "\0" * 8, "é" * 10])
async def test_a_text_that_names_no_version_is_refused(server: Server, version: str) -> None:
    await server.cycle()
    for request in (
        server.publications.accept(version),
        server.publications.pin(version, None),
        server.publications.export(version),
        server.publications.diff(version, server.version),
    ):
        with pytest.raises(InvalidRequest, match="8 to 64 digits"):
            await request


async def test_eighty_characters_of_a_long_text_that_names_no_version_are_shown(server: Server) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await server.publications.accept("x" * 81)
    assert str(caught.value).startswith(f"'{'x' * 80}' names no version")


async def test_a_pin_of_a_held_version_names_accept_and_an_acceptance_of_a_published_one_names_pin(
    server: Server,
) -> None:
    await server.cycle()
    good = server.version
    await server.cycle(*FEW)
    held = server.held
    with pytest.raises(PublicationError, match=f"is held .*accept {held[:16]}"):
        await server.publications.pin(held[:8], None)
    assert server.synchronizer.state.pin is None
    with pytest.raises(UnknownVersion, match=f"published before. The held version is {held}. .*pin {good[:8]}"):
        await server.publications.accept(good[:8])
    await server.publications.accept(held)
    assert await server.publications.pin(held[:8], None) is None, "it passed"


async def test_an_unknown_version_is_answered_with_a_list_of_the_known_versions(server: Server) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    await server.cycle(*FEW)
    for request in (
        server.publications.pin("ab" * 32, None),
        server.publications.export("ab" * 32),
        server.publications.diff("ab" * 32, old),
    ):
        with pytest.raises(UnknownVersion, match=old[:16]):
            await request
    with pytest.raises(UnknownVersion, match=server.held):
        await server.publications.accept("ab" * 32)
    with pytest.raises(UnknownVersion, match="published before"):
        await server.publications.accept(old)
    with pytest.raises(UnknownVersion, match="is held"):
        await server.publications.pin(server.held, None)
    with pytest.raises(InvalidRequest, match="past"):
        await server.publications.pin(old, server.clock.now)


async def test_versions_can_be_listed_compared_and_exported_the_held_one_included(server: Server) -> None:
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.cycle(*FEW)
    history = await server.publications.history()
    assert [entry.version_hash for entry in history] == [new, old]
    assert [entry.definitions for entry in history] == [40, 40]
    before, after, changes = await server.publications.diff(old[:8], new[:8])
    assert (before, after, changes.changed) == (old, new, ("c00",))
    _, _, changes = await server.publications.diff(new, server.held)
    assert len(changes.removed) == 36
    assert (await server.publications.export(old)).version_hash == old
    assert (await server.publications.export(None)).version_hash == new


async def test_the_history_keeps_the_last_versions_and_never_loses_a_pinned_one(server: Server) -> None:
    server.keep = 3
    server.restart()
    await server.cycle()
    first = server.version
    await server.publications.pin(first, None)
    for number in range(6):
        await server.cycle(row("c00", f"v{number}"), *ALL[1:])
    kept = [entry.version_hash for entry in await server.publications.history()]
    assert len(kept) == 4
    assert kept[-1] == first
    assert server.synchronizer.state.history_entries == 4
