"""``snapshot inspect`` on undamaged, damaged and hostile files."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.unit.definition_server.cli.command_server import on_a_terminal

from definition_server.catalog.builder import BuiltSnapshot, SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.layout import FOOTER_SIZE, SLOT, Footer
from definition_server.catalog.signing import UNSIGNED, Signer
from definition_server.cli.snapshot import snapshot

CODE = b"def plus(x):\n    return x + 1\n"
ROWS = [
    Row(1, b"plus", None, b'[{"item": "x", "type": "var"}]', CODE),
    Row(2, "tab\tñ\x1b[2J".encode(), b"task", b"", b"pass"),
]
CREATED_NS = 1_700_000_000_123_000_000


def built(rows: list[Row] = ROWS, signer: Signer | None = None, created_ns: int = CREATED_NS) -> BuiltSnapshot:
    builder = SnapshotBuilder(signer)
    builder.add(rows)
    return builder.build(generation=7, created_at_ns=created_ns)


def stored(directory: Path, octets: bytes) -> Path:
    path = directory / "file.avapsnap"
    path.write_bytes(octets)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return stored(tmp_path, built().to_bytes())


def inspect(path: Path, *options: str) -> Result:
    result = CliRunner().invoke(snapshot, ["inspect", str(path), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def inspected_on_a_terminal(path: Path, *options: str) -> str:
    environment: dict[str, str | None] = {"COLUMNS": "120"}
    return on_a_terminal("snapshot", "inspect", str(path), *options, environment=environment, module="snapshot")


def test_the_facts_of_a_whole_snapshot_are_printed(file: Path) -> None:
    result = inspect(file)
    assert result.exit_code == 0
    facts = dict(re.findall(r"^([a-z -]+): +(.*)$", result.stdout, re.MULTILINE))
    assert facts["generation"] == "7"
    assert re.fullmatch(r"2023-11-14T22:13:20\.123\+00:00 \(\d+ days ago\)", facts["created at"])
    assert facts["definitions"] == "2"
    assert facts["bytes"] == f"{file.stat().st_size:,}"
    assert facts["body bytes"] == f"{built().footer.body_length:,}"
    assert facts["version hash"] == built().footer.version_hash.hex()
    assert facts["signed"] == "no"


@pytest.mark.parametrize("signer", [None, Signer("internal")], ids=["unsigned", "signed"])
def test_the_facts_are_one_json_object(tmp_path: Path, signer: Signer | None) -> None:
    made = built(signer=signer)
    path = stored(tmp_path, made.to_bytes())
    facts = json.loads(inspect(path, "--json").stdout)
    age = facts.pop("age_seconds")
    assert -1 < time.time() - CREATED_NS / 1e9 - age < 60  # rounded to milliseconds
    assert facts == {
        "generation": 7,
        "created_at": "2023-11-14T22:13:20.123+00:00",
        "count": 2,
        "bytes": made.size,
        "body_bytes": made.footer.body_length,
        "version_hash": made.footer.version_hash.hex(),
        "signed": signer is not None,
        "key_id": None if signer is None else signer.key_id.hex(),
    }


def test_a_signed_snapshot_is_shown_as_signed(tmp_path: Path) -> None:
    signer = Signer("internal")
    path = stored(tmp_path, built(signer=signer).to_bytes())
    assert f"yes (key id {signer.key_id.hex()})" in inspect(path).stdout


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-60, "in the future"), (5, "5 seconds ago"), (600, "10 minutes ago"), (7300, "2 hours ago")],
)
def test_the_age_is_shown_in_the_largest_fitting_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, told: str
) -> None:
    monkeypatch.setattr("definition_server.cli.snapshot.time.time", lambda: CREATED_NS / 1e9 + seconds)
    assert told in inspect(stored(tmp_path, built().to_bytes())).stdout


def test_an_empty_catalogue_is_undamaged(tmp_path: Path) -> None:
    path = stored(tmp_path, built([]).to_bytes())
    assert json.loads(inspect(path, "--json", "--list").stdout)["definitions"] == []
    assert inspect(path, "--list").stdout == ""


def test_the_list_has_one_tab_separated_line_per_definition(file: Path) -> None:
    head, *lines = [line.split("\t") for line in inspect(file, "--list").stdout.splitlines()]
    assert head == ["name", "type", "code bytes", "hash"]
    assert [line[:3] for line in lines] == [
        ["plus", "function", str(len(CODE))],
        [r"tab\tñ\x1b[2J", "task", "4"],
    ]
    assert all(re.fullmatch(r"[0-9a-f]{64}", line[3]) for line in lines)


def test_the_json_output_has_the_facts_and_the_list(file: Path) -> None:
    value = json.loads(inspect(file, "--json", "--list").stdout)
    assert value["generation"] == 7
    assert [(each["name"], each["type"], each["code_bytes"]) for each in value["definitions"]] == [
        ("plus", "function", len(CODE)),
        ("tab\tñ\x1b[2J", "task", 4),
    ]


def test_the_list_on_a_terminal_is_a_table_without_foreign_escapes(file: Path) -> None:
    shown = inspected_on_a_terminal(file, "--list")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert re.search(rf"plus +function +{len(CODE)} +[0-9a-f]{{64}}", plain)
    assert r"tab\tñ\x1b[2J" in plain
    assert "\x1b[2J" not in shown


def test_one_definition_is_printed_by_name(file: Path) -> None:
    result = inspect(file, "--name", "plus")
    assert result.exit_code == 0
    assert "x (var)" in result.stdout
    assert CODE.decode() in result.stdout


def test_one_definition_on_a_terminal_is_highlighted(file: Path) -> None:
    assert re.search(r"\x1b\[[0-9;]+mdef\x1b", inspected_on_a_terminal(file, "--name", "plus"))
    assert "none" in inspected_on_a_terminal(file, "--name", "tab\tñ\x1b[2J")


def test_one_signed_definition_as_json_holds_its_package(tmp_path: Path) -> None:
    signer = Signer("internal")
    path = stored(tmp_path, built(signer=signer).to_bytes())
    value = json.loads(inspect(path, "--name", "plus", "--json").stdout)
    assert (value["name"], value["signed"]) == ("plus", True)
    assert signer.unpack(base64.b64decode(value["code"])) == CODE


def test_id_and_bytecode_are_shown_if_they_are_served(tmp_path: Path) -> None:
    row = Row(7, b"plus", None, None, b"pass", b"\0bytecode", 3)
    path = stored(tmp_path, built([row]).to_bytes())
    value = json.loads(inspect(path, "--name", "plus", "--json").stdout)
    assert (value["id"], base64.b64decode(value["avbc_code"]), value["avbc_version"]) == (7, b"\0bytecode", 3)
    shown = inspect(path, "--name", "plus").stdout
    assert re.search(r"id: +7\n", shown)
    assert re.search(r"bytecode: +9 bytes, version 3\n", shown)
    path = stored(tmp_path, built([row._replace(id=None, avbc_code=None)]).to_bytes())
    value = json.loads(inspect(path, "--name", "plus", "--json").stdout)
    assert value["id"] is None
    assert not {"avbc_code", "avbc_version"} & value.keys()


def test_an_unknown_name_exits_3(file: Path) -> None:
    result = inspect(file, "--name", "nope")
    assert result.exit_code == 3
    assert "'nope'" in result.stderr


def test_a_name_that_is_not_utf8_is_refused(file: Path) -> None:
    assert inspect(file, "--name", "\udcff").exit_code == 2


def test_list_and_name_exclude_each_other(file: Path) -> None:
    assert inspect(file, "--list", "--name", "plus").exit_code == 2


@pytest.mark.parametrize("options", [[], ["--json"], ["--list"], ["--name", "plus"]], ids=str)
@pytest.mark.parametrize(
    ("position", "check"),
    [
        (0, "content checksum"),
        (built().footer.body_length, "content checksum"),
        (-FOOTER_SIZE, "magic"),
        (-FOOTER_SIZE + 8, "format"),
        (-FOOTER_SIZE + 40, "footer checksum"),
        (-1, "footer checksum"),
    ],
)
def test_one_flipped_bit_exits_1_and_names_the_check(
    tmp_path: Path, position: int, check: str, options: list[str]
) -> None:
    octets = bytearray(built().to_bytes())
    octets[position] ^= 1
    result = inspect(stored(tmp_path, octets), *options)
    assert result.exit_code == 1
    assert f"is not usable: {check}" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("length", [0, 1, FOOTER_SIZE - 1, FOOTER_SIZE, built().size - 1])
def test_a_truncated_file_exits_1_with_that_reason(tmp_path: Path, length: int) -> None:
    result = inspect(stored(tmp_path, built().to_bytes()[:length]))
    assert result.exit_code == 1
    assert "truncated" in result.stderr


def test_octets_put_in_front_exit_1_and_name_the_size(tmp_path: Path) -> None:
    result = inspect(stored(tmp_path, b"\0" + built().to_bytes()))
    assert result.exit_code == 1
    assert "size: " in result.stderr


def test_a_missing_file_exits_1_and_is_named(tmp_path: Path) -> None:
    result = inspect(tmp_path / "nothing")
    assert result.exit_code == 1
    assert f"cannot read {tmp_path / 'nothing'}: No such file" in result.stderr


def test_a_file_that_is_not_regular_exits_1_without_blocking(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, Path("/dev/zero")):
        result = inspect(path)
        assert result.exit_code == 1
        assert "not a regular file" in result.stderr


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x7f", b"\x0a\x02\x0a\x7f", b"\x0a\x03\x0a\x01\xff"], ids=repr)
def test_a_body_that_is_not_a_catalogue_with_a_right_checksum_exits_1(tmp_path: Path, body: bytes) -> None:
    content = body + bytes(8 * SLOT.size)
    digest = hashlib.sha256(content).digest()
    footer = Footer(1, CREATED_NS, 1, len(body), 8, UNSIGNED, bytes(32), digest)
    path = stored(tmp_path, content + footer.pack())
    for result in (inspect(path), inspect(path, "--list")):
        assert result.exit_code == 1
        assert "is not usable: body: " in result.stderr
