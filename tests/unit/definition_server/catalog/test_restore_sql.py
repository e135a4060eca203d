"""The rows of a catalogue, and the script by which PostgreSQL restores them. (tests/integration/test_export.py runs
it.)"""

from __future__ import annotations

import re

import pytest
from tests.support.snapshots import opened

from definition_server.catalog import wire
from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.restore_sql import RestoreError, TableRow, literal, row_of, script
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.table_reading import SETTINGS_SQL


def rows_of(*rows: Row, signer: Signer | None = None) -> list[TableRow]:
    builder = SnapshotBuilder(signer)
    builder.add(rows)
    snapshot = Snapshot(builder.build(generation=1, created_at_ns=0).to_bytes())
    return [row_of(message) for message in snapshot.messages()]


@pytest.mark.parametrize("signer", [None, Signer("key"), Signer("key", 2)], ids=["unsigned", "version 1", "version 2"])
def test_a_row_is_restored_unchanged_whether_it_was_signed_or_not(signer: Signer | None) -> None:
    code = "print('é')\r\n\\".encode()
    [row] = rows_of(Row(7, b"if", b"control", b'[{"item":  1.50}]', code), signer=signer)
    assert row == TableRow(7, "if", "control", '[{"item":  1.50}]', code.decode())


@pytest.mark.parametrize(("given", "known"), [(1, 1), (2**31 - 1, 2**31 - 1), (-5, -5), (2**40, None), (0, None)])
def test_an_id_in_the_catalogue_is_restored(given: int, known: int | None) -> None:
    [row] = rows_of(Row(given, b"if", b"t", b"[]", b"pass"))
    assert row.id == known


@pytest.mark.parametrize("signer", [None, Signer("key")], ids=["unsigned", "signed"])
@pytest.mark.parametrize(("version", "known"), [(3, 3), (-3, -3), (None, 0), (2**31 - 1, 2**31 - 1)])
def test_bytecode_and_its_version_are_restored(version: int | None, known: int, signer: Signer | None) -> None:
    [row] = rows_of(Row(1, b"if", b"t", b"[]", b"pass", b"\0\xffbytecode", version), signer=signer)
    assert (row.bytecode, row.bytecode_version) == (b"\0\xffbytecode", known)


def test_the_script_changes_the_bytecode_table_only_if_the_catalogue_has_bytecode() -> None:
    plain, compiled = TableRow(1, "a", "t", "[]", "x"), TableRow(2, "b", "t", "[]", "y", b"\0\x27\\", -3)
    without, text = ("".join(script(rows, version_hash="")) for rows in ([plain], [plain, compiled]))
    assert "avap_bytecode" not in re.sub("^--.*", "", without, flags=re.MULTILINE)
    assert "stays as it is" in without
    assert "INSERT INTO restored_bytecode VALUES\n(2, '\\x00275c', -3);\n" in text
    assert "-- Bytecode of 1 commands." in text
    assert text.endswith("COMMIT;\n")


def test_bytecode_is_included_in_the_size_of_a_piece() -> None:
    rows = [TableRow(number, f"n{number}", "t", "[]", "x", b"x" * 1000) for number in range(500)]
    pieces = list(script(rows, version_hash=""))
    assert max(map(len, pieces)) < 70_000
    assert min(map(len, pieces[1:-4])) > 65_000, "only the last piece with rows may be short"


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("", "''"),
        ("plain", "'plain'"),
        ("it's", "'it''s'"),
        ("a\nb\tc", "'a\nb\tc'"),
        ("\\", r"E'\\'"),
        ("\r\n", "E'\\r\n'"),
        ("\x01'\x7f", r"E'\x01''\x7f'"),
        ("$$ 😀", "'$$ 😀'"),
    ],
)
def test_a_text_with_a_backslash_or_a_control_character_becomes_an_escape_string(text: str, sql: str) -> None:
    assert literal(text) == sql


@pytest.mark.parametrize("code", [b"\xff", b"a\0b"])
def test_a_text_that_no_column_can_hold_is_refused_with_the_name_of_its_command(code: bytes) -> None:
    message = wire.field(1, b"if") + wire.field(4, code)
    with pytest.raises(RestoreError, match="'if'"):
        row_of(memoryview(message))


def test_the_script_is_one_transaction_in_pieces_of_bounded_size() -> None:
    rows = [TableRow(number, f"n{number}", "t", "[]", "x" * 1000) for number in range(500)]
    pieces = list(script(rows, version_hash="ab" * 32))
    assert max(map(len, pieces)) < 70_000
    assert min(map(len, pieces[1:-4])) > 65_000, "only the last piece with rows may be short"
    text = "".join(pieces)
    assert re.findall(r"^(BEGIN|COMMIT);$", text, re.MULTILINE) == ["BEGIN", "COMMIT"]
    assert text.endswith("COMMIT;\n")
    assert "ab" * 32 in text
    assert "-- 500 rows." in text


def test_a_version_hash_from_a_server_cannot_inject_sql() -> None:
    text = "".join(script([], version_hash="ab\n; DROP TABLE x; --"))
    assert "DROP TABLE" not in text


def test_a_catalogue_without_commands_empties_the_table() -> None:
    assert "DELETE FROM" in "".join(script([], version_hash=opened("if").version_hash))


def test_texts_are_compared_under_the_settings_that_the_server_reads_them_with() -> None:
    read_with = dict(re.findall(r"set_config\('(\w+)', '([^']*)', true\)", SETTINGS_SQL))
    del read_with["jit"]  # no text depends on this setting
    compared_with = dict(re.findall(r"^SET LOCAL (\w+) = '?([^';]*)'?;$", "".join(script([], version_hash="")), re.M))
    assert len(read_with) > 5
    assert read_with.items() <= compared_with.items()
