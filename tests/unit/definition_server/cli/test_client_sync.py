"""``fetch`` against a gRPC server in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.definition_server.cli.command_server import CODE, Server, on_a_terminal

from definition_server.catalog.signing import Signer
from definition_server.cli import client
from definition_server.rpc import avap_pb2

HOSTILE_NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a%2Fb",
    "",
    ".",
    "..",
    ".hidden",
    "%empty",
    "con.txt",
    "version",
    "catalog.json",
    "línea\n日本 \U0001f600",
    "nul\0byte",
    "n" * 252,
    "n" * 253,
    "n" * 300,
    "/" * 300,
]


def test_sync_prints_count_version_bytes_and_duration(server: Server) -> None:
    server.engine.add("plus")
    server.engine.add("minus")
    result = server.run(client.fetch)
    assert result.exit_code == 0
    assert re.search(r"definitions: +2\n", result.stdout)
    assert re.search(rf"version hash: {'5e' * 32}\n", result.stdout)
    assert re.search(r"bytes: +\d+\n", result.stdout)
    assert re.search(r"duration: +\d+\.\d+ s\n", result.stdout)
    assert result.stderr == ""


def test_sync_json_prints_the_summary(server: Server) -> None:
    server.engine.add("plus")
    summary = json.loads(server.run(client.fetch, "--json").stdout)
    assert summary.pop("duration_seconds") >= 0
    catalogue = avap_pb2.CatalogResponse(commands=server.engine.commands, total_count=1, version_hash="5e" * 32)
    assert summary == {
        "server": f"127.0.0.1:{server.port}",
        "count": 1,
        "version_hash": "5e" * 32,
        "bytes": len(catalogue.SerializeToString()),
        "out": None,
    }


def test_sync_receives_20_megabytes_above_grpcs_default_limit(server: Server) -> None:
    for number in range(20_000):
        server.engine.add(f"command_{number}", code=b"#" * 1000)
    summary = json.loads(server.run(client.fetch, "--json").stdout)
    assert summary["count"] == 20_000
    assert summary["bytes"] > 20_000_000


def test_sync_out_writes_a_file_for_each_definition_and_the_catalogue(server: Server, tmp_path: Path) -> None:
    package = Signer("internal").pack(CODE)
    server.engine.add("plus")
    server.engine.add("signed", code=package, interface="no json")
    out = tmp_path / "deep" / "out"
    result = server.run(client.fetch, "--out", str(out))
    assert result.exit_code == 0
    assert f"written to:   {out}\n" in result.stdout
    assert (out / "plus.py").read_bytes() == CODE
    assert (out / "signed.py").read_bytes() == package
    assert (out / "version").read_text() == "5e" * 32 + "\n"
    common = {"type": "function", "hash": "a1" * 32}
    assert json.loads((out / "catalog.json").read_text()) == [
        {"name": "plus", "interface": [{"item": "x", "type": "var"}], "file": "plus.py"} | common,
        {"name": "signed", "interface": "no json", "file": "signed.py"} | common,
    ]
    assert len(list(out.iterdir())) == 4


def test_sync_out_writes_every_hostile_name_to_its_own_file_in_the_directory(server: Server, tmp_path: Path) -> None:
    for name in HOSTILE_NAMES:
        server.engine.add(name, code=name.encode())
    out = tmp_path / "out"
    assert server.run(client.fetch, "--out", str(out)).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    entries = json.loads((out / "catalog.json").read_text())
    files = {entry["file"] for entry in entries}
    assert {entry["name"] for entry in entries} == set(HOSTILE_NAMES)
    assert {path.name for path in out.iterdir()} == files | {"catalog.json", "version"}
    assert len(files) == len(HOSTILE_NAMES)
    for entry in entries:
        assert (out / entry["file"]).read_bytes() == entry["name"].encode()


@given(st.text(), st.text())
def test_a_file_name_is_one_visible_component_and_different_for_different_names(one: str, other: str) -> None:
    for name in (one, other, one * 100):
        assert re.fullmatch(r"[A-Za-z0-9_%-][A-Za-z0-9_.%-]*\.py", client.file_name(name))
        assert len(client.file_name(name)) <= 255
    assert (client.file_name(one) == client.file_name(other)) == (one == other)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("plus", "plus.py"),
        ("con.txt", "con.txt.py"),
        ("a/b", "a%2Fb.py"),
        ("..", "%2E..py"),
        ("", "%empty.py"),
        ("ñ", "%C3%B1.py"),
        ("n" * 252, "n" * 252 + ".py"),
    ],
)
def test_file_names_are_percent_encoded(name: str, file: str) -> None:
    assert client.file_name(name) == file


def test_sync_out_replaces_a_link_and_leaves_its_target(server: Server, tmp_path: Path) -> None:
    server.engine.add("plus")
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.write_text("precious")
    out.mkdir()
    (out / "plus.py").symlink_to(outside)
    assert server.run(client.fetch, "--out", str(out)).exit_code == 0
    assert outside.read_text() == "precious"
    assert (out / "plus.py").read_bytes() == CODE


def test_sync_out_refuses_a_file_in_place_of_the_directory(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    result = server.run(client.fetch, "--out", str(file))
    assert result.exit_code == 2
    assert f"'{file}' is a file" in result.stderr
    assert file.read_text() == "precious"
    assert not server.engine.called.is_set()


def test_sync_out_that_cannot_be_written_exits_1_and_leaves_no_version(server: Server, tmp_path: Path) -> None:
    server.engine.add("plus")
    (tmp_path / "version").write_text("old")
    (tmp_path / "plus.py").mkdir()
    result = server.run(client.fetch, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plus.py"]


def test_sync_out_below_a_file_exits_1(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = server.run(client.fetch, "--out", str(tmp_path / "file" / "out"))
    assert result.exit_code == 1
    assert "Not a directory" in result.stderr


def test_sync_out_refuses_an_answer_with_a_name_twice_and_writes_nothing(server: Server, tmp_path: Path) -> None:
    server.engine.add("plus")
    server.engine.add("plus")
    result = server.run(client.fetch, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "same name" in result.stderr
    assert not (tmp_path / "out").exists()


def test_sync_shows_progress_on_a_terminal_and_on_stderr_only(server: Server, tmp_path: Path) -> None:
    server.engine.add("plus")
    with (tmp_path / "stdout").open("wb") as stdout:
        shown = on_a_terminal("fetch", "--json", "--out", str(tmp_path), environment=server.environment, stdout=stdout)
    assert "writing" in shown
    assert json.loads((tmp_path / "stdout").read_text())["count"] == 1
