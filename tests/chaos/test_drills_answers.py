"""Which answers the load of a drill considers wrong, and what it requires of a table."""

from __future__ import annotations

import pytest
from tests.chaos.drills import rows
from tests.chaos.drills.answers import Checker, WrongAnswer
from tests.support.snapshots import row

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.rpc import avap_pb2

COUNT, SIZE = 20, 50
NAME = "command000007"
ONE_MORE = avap_pb2.CatalogResponse(commands=[avap_pb2.CommandResponse(name="command000019")], total_count=21)


def snapshot(*versions: int, signer: Signer | None = None, count: int = COUNT) -> Snapshot:
    """The catalogue that a server builds from a table whose rows are of these versions in turn."""
    builder = SnapshotBuilder(signer)
    names = rows.names(count)
    for number, name in enumerate(names):
        code = rows.code(name, versions[number % len(versions)], SIZE)
        builder.add([row(name, code.decode(), id=number)])
    return Snapshot(builder.build(generation=1, created_at_ns=0).to_bytes())


def answers(served: Snapshot) -> tuple[bytes, bytes]:
    """Answers to ``GetCommand(NAME)`` and to ``SyncCatalog``."""
    found = served.answer(NAME.encode())
    assert found is not None
    return bytes(found), bytes(served.body)


def test_a_complete_answer_gives_its_version() -> None:
    checker = Checker(COUNT, SIZE)
    for version in (3, 4, 3):
        definition, catalogue = answers(snapshot(version))
        assert checker.definition(NAME, definition) == str(version)
        assert checker.catalogue(catalogue) == str(version)


def test_signed_code_is_judged_by_the_payload_of_its_package() -> None:
    definition, catalogue = answers(snapshot(3, signer=Signer("secret")))
    assert Checker().definition(NAME, definition) is None
    assert Checker().catalogue(catalogue) == snapshot(3).version_hash


def test_the_version_of_a_foreign_catalogue_is_its_hash() -> None:
    definition, catalogue = answers(snapshot(1, 2))
    assert Checker().definition(NAME, definition) is None
    assert Checker().catalogue(catalogue) == snapshot(1, 2).version_hash


def test_a_catalogue_of_two_versions_is_wrong() -> None:
    with pytest.raises(WrongAnswer, match="rows of the versions 1, 2"):
        Checker(COUNT, SIZE).catalogue(answers(snapshot(1, 2))[1])


def test_an_incomplete_catalogue_is_wrong() -> None:
    with pytest.raises(WrongAnswer, match="a catalogue of 10 definitions; every version has 20"):
        Checker(COUNT, SIZE).catalogue(answers(snapshot(1, count=10))[1])


def test_the_answer_for_another_command_is_wrong() -> None:
    checker = Checker(COUNT, SIZE)
    definition, _ = answers(snapshot(1))
    checker.definition(NAME, definition)
    for name in ("command000008", "command00000"):
        with pytest.raises(WrongAnswer, match=f"asked for {name}"):
            checker.definition(name, definition)


def tampered(**changes: object) -> bytes:
    message = avap_pb2.CommandResponse.FromString(answers(snapshot(1))[0])
    for name, value in changes.items():
        setattr(message, name, value)
    return message.SerializeToString()


@pytest.mark.parametrize("changes", [{"code": b"other"}, {"hash": "0" * 64}, {"type": "x"}, {"interface_json": "[1]"}])
def test_a_definition_with_the_wrong_hash_is_wrong(changes: dict[str, object]) -> None:
    for checker in (Checker(), Checker(COUNT, SIZE)):
        with pytest.raises(WrongAnswer, match="its hash is not that of its content"):
            checker.definition(NAME, tampered(**changes))


def test_code_of_no_known_version_is_wrong() -> None:
    code = rows.code(NAME, 1, SIZE + 1)
    message = tampered(code=code, hash=rows.definition_hash(NAME, "function", "[]", code))
    assert Checker().definition(NAME, message) is None
    with pytest.raises(WrongAnswer, match="its code is that of no version"):
        Checker(COUNT, SIZE).definition(NAME, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: setattr(found, "total_count", 19), "total_count is 19, there are 20"),
        (lambda found: setattr(found, "version_hash", "0" * 64), "is not that of the 20 definitions"),
        (lambda found: found.commands.reverse(), "not sorted by name"),
        (lambda found: found.MergeFrom(ONE_MORE), "occurs twice"),
        (lambda found: setattr(found.commands[3], "code", b"x"), "command000003: its hash"),
    ],
)
def test_a_catalogue_with_the_wrong_count_hash_or_order_is_wrong(change: object, message: str) -> None:
    found = avap_pb2.CatalogResponse.FromString(answers(snapshot(1))[1])
    change(found)
    for checker in (Checker(), Checker(COUNT, SIZE)):
        with pytest.raises(WrongAnswer, match=message):
            checker.catalogue(found.SerializeToString())


def test_the_server_and_the_table_agree_on_the_hash_of_a_version() -> None:
    assert rows.expected_hash(5, COUNT, SIZE) == snapshot(5).version_hash
