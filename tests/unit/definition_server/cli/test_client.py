"""``get``, ``fetch`` and ``health`` against a gRPC server in this process."""

from __future__ import annotations

import base64
import json
import os
import pty
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from click.testing import CliRunner, Result
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from definition_server.catalog.signing import Signer
from definition_server.cli import client
from definition_server.rpc import avap_pb2, avap_pb2_grpc

KEY = "a key of the tests"
CODE = b"def plus(x):\n    return x + 1\n"
INTERFACE = '[{"item": "x", "type": "var"}]'
PATIENCE = 30.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
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


class Engine(avap_pb2_grpc.DefinitionEngineServicer):
    """Serves ``commands``; fails as ``failure`` says; delays every answer while ``gate`` is closed."""

    def __init__(self) -> None:
        self.commands: list[avap_pb2.CommandResponse] = []
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.called = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def add(self, name: str, code: bytes = CODE, interface: str = INTERFACE) -> None:
        self.commands.append(
            avap_pb2.CommandResponse(name=name, type="function", interface_json=interface, code=code, hash="a1" * 32)
        )

    def _admit(self, context: grpc.ServicerContext) -> None:
        self.called.set()
        self.gate.wait(PATIENCE)
        if dict(context.invocation_metadata()).get("x-avap-auth") != KEY:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid Credentials")
        if self.failure is not None:
            context.abort(*self.failure)

    def GetCommand(self, request: Any, context: Any) -> avap_pb2.CommandResponse:
        self._admit(context)
        for command in self.commands:
            if command.name == request.name:
                return command
        context.abort(grpc.StatusCode.NOT_FOUND, f"Command '{request.name}' not found")
        raise AssertionError

    def SyncCatalog(self, request: Any, context: Any) -> avap_pb2.CatalogResponse:
        self._admit(context)
        return avap_pb2.CatalogResponse(commands=self.commands, total_count=len(self.commands), version_hash="5e" * 32)


class Server:
    """A gRPC server on 127.0.0.1 that can be stopped and started again on the same port."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.health: Any = grpc_health.HealthServicer()
        self.port = 0
        self._server: grpc.Server | None = None
        self.pool: ThreadPoolExecutor | None = None

    def start(self) -> None:
        self.pool = ThreadPoolExecutor(8)
        options = [("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 1)]
        self._server = grpc.server(self.pool, options=options)
        avap_pb2_grpc.add_DefinitionEngineServicer_to_server(self.engine, self._server)
        if self.health is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        self.engine.gate.set()
        if self._server is not None and self.pool is not None:
            self._server.stop(0).wait(PATIENCE)
            self.pool.shutdown()

    @property
    def environment(self) -> dict[str, str | None]:
        return {**NO_SETTINGS, "API_KEY": KEY, "PORT": str(self.port)}

    def run(self, command: click.Command, *arguments: str, **environment: str | None) -> Result:
        return invoke(command, *arguments, **{**self.environment, **environment})


NO_SETTINGS: dict[str, str | None] = {
    "API_KEY": None,
    "API_KEY_FILE": None,
    "DEFINITION_SERVER_HOST": None,
    "PORT": None,
}


def invoke(command: click.Command, *arguments: str, **environment: str | None) -> Result:
    result = CliRunner().invoke(command, list(arguments), env={**NO_SETTINGS, **environment})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    running.start()
    running.health.set("", SERVING)
    yield running
    running.stop()


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port that refuses: bound, and never listening."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def spawn(command: str, *arguments: str, environment: dict[str, str | None], **streams: Any) -> Any:
    """The command in a process of its own, in which SIGINT has its default action even if this process ignores it."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from definition_server.cli.client import {command}; {command}()"
    )
    variables = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color", **environment}
    given = {name: value for name, value in variables.items() if value is not None and name != "NO_COLOR"}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], env=given, **streams)


def on_a_terminal(command: str, *arguments: str, environment: dict[str, str | None], stdout: Any = None) -> str:
    """The command's output on a terminal (its stderr where ``stdout`` is given)."""
    controller, terminal = pty.openpty()
    try:
        target = terminal if stdout is None else stdout
        process = spawn(command, *arguments, environment=environment, stdout=target, stderr=terminal)
    finally:
        os.close(terminal)
    shown = b""
    with os.fdopen(controller, "rb", buffering=0) as screen, process:
        try:
            while octets := screen.read(65_536):
                shown += octets
        except OSError:  # EIO: the other side was closed
            pass
    assert process.returncode == 0, shown
    return shown.decode()


# get


def test_get_prints_plain_text_if_stdout_is_not_a_terminal(server: Server) -> None:
    server.engine.add("plus")
    result = server.run(client.get, "plus")
    assert result.exit_code == 0
    for part in ("plus", "function", "a1" * 32, "x (var)", "not signed", CODE.decode()):
        assert part in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_get_on_a_terminal_shows_the_interface_as_a_table_and_highlights_the_code(server: Server) -> None:
    server.engine.add("plus")
    shown = on_a_terminal("get", "plus", environment=server.environment)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert re.search(r"│ x +│ var +│", plain)
    assert "def plus(x):" in plain
    assert re.search(r"\x1b\[[0-9;]+mdef\x1b", shown)


def test_get_on_a_terminal_escapes_control_characters_of_the_table(server: Server) -> None:
    server.engine.add("x\x1b]0;owned\x07", code=b"# \x1b[2J\n", interface='[{"item": "\\u001b[2J"}]')
    shown = on_a_terminal("get", "x\x1b]0;owned\x07", environment=server.environment)
    assert "\x1b]0;" not in shown
    assert "\x1b[2J" not in shown
    assert shown.count(r"\x1b[2J") == 2


def test_get_code_only_on_a_terminal_escapes_control_characters(server: Server) -> None:
    server.engine.add("x", code=b"one\x1b[2J\ttwo\r\n\x9b1mthree\xff\xe2\x80\xae\n")
    shown = on_a_terminal("get", "x", "--code-only", environment=server.environment)
    assert shown.replace("\r\n", "\n").replace("        ", "\t") == "one\\x1b[2J\ttwo\\r\n\\x9b1mthree\\xff\\u202e\n"


@pytest.mark.parametrize("force", [None, "1"])
def test_get_through_a_pipe_has_no_colours_even_where_they_are_forced(server: Server, force: str | None) -> None:
    server.engine.add("plus")
    assert "\x1b" not in server.run(client.get, "plus", FORCE_COLOR=force).stdout


def test_get_json_is_one_object_with_the_code_as_text(server: Server) -> None:
    server.engine.add("plus")
    assert json.loads(server.run(client.get, "plus", "--json").stdout) == {
        "name": "plus",
        "type": "function",
        "interface": [{"item": "x", "type": "var"}],
        "hash": "a1" * 32,
        "signed": False,
        "code_encoding": "utf-8",
        "code": CODE.decode(),
    }


def test_get_json_gives_a_signed_package_whole_and_in_base64(server: Server) -> None:
    package = Signer("internal").pack(CODE)
    server.engine.add("plus", code=package)
    answer = json.loads(server.run(client.get, "plus", "--json").stdout)
    assert answer["signed"] is True
    assert answer["code_encoding"] == "base64"
    assert base64.b64decode(answer["code"]) == package


def test_get_json_gives_code_that_is_not_utf8_in_base64(server: Server) -> None:
    server.engine.add("odd", code=b"\xff\xfe")
    answer = json.loads(server.run(client.get, "odd", "--json").stdout)
    assert (answer["signed"], answer["code_encoding"]) == (False, "base64")
    assert base64.b64decode(answer["code"]) == b"\xff\xfe"


def test_get_shows_the_payload_of_a_signed_package_and_says_signed(server: Server) -> None:
    server.engine.add("plus", code=Signer("internal").pack(CODE))
    shown = server.run(client.get, "plus").stdout
    assert ", signed\n" in shown
    assert CODE.decode() in shown


@pytest.mark.parametrize("code", [CODE, b"no newline", b"\xff\0\n\r\n", b"", Signer("internal").pack(CODE)])
def test_get_code_only_writes_the_octets_as_served(server: Server, code: bytes) -> None:
    server.engine.add("plus", code=code)
    assert server.run(client.get, "plus", "--code-only").stdout_bytes == code


@pytest.mark.parametrize(
    "interface",
    ["[]", "", "no json", '{"item": 1}', "[1.5, null]", "[NaN]", "[1e999]", "[" * 990 + "]" * 990, '["\\ud800"]'],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_get_prints_any_interface(server: Server, interface: str, form: list[str]) -> None:
    server.engine.add("odd", interface=interface)
    result = server.run(client.get, "odd", *form)
    assert result.exit_code == 0
    if form:
        parsed = json.loads(result.stdout, parse_constant=pytest.fail)["interface"]
        assert isinstance(parsed, list) or parsed == interface


def test_get_of_an_unknown_name_exits_3(server: Server) -> None:
    result = server.run(client.get, "nope")
    assert result.exit_code == 3
    assert "Command 'nope' not found" in result.stderr
    assert result.stdout == ""


def test_get_accepts_a_name_like_an_option_after_two_dashes(server: Server) -> None:
    server.engine.add("--json")
    assert server.run(client.get, "--", "--json").exit_code == 0


def test_get_refuses_json_together_with_code_only(server: Server) -> None:
    assert server.run(client.get, "plus", "--json", "--code-only").exit_code == 2


def test_get_refuses_a_name_that_is_not_utf8(server: Server) -> None:
    result = server.run(client.get, "\udcff")
    assert result.exit_code == 2
    assert "UTF-8" in result.stderr


# What get and sync share


CALLS = [pytest.param(client.get, ["plus"], id="get"), pytest.param(client.fetch, [], id="fetch")]


@pytest.mark.parametrize(("command", "arguments"), CALLS)
def test_a_wrong_key_exits_4_and_says_which_variable(
    server: Server, command: click.Command, arguments: list[str]
) -> None:
    result = server.run(command, *arguments, API_KEY="wrong")
    assert result.exit_code == 4
    assert "set API_KEY to the server's key" in result.stderr


@pytest.mark.parametrize(("command", "arguments"), CALLS)
def test_a_missing_key_exits_78_before_any_call(server: Server, command: click.Command, arguments: list[str]) -> None:
    result = server.run(command, *arguments, API_KEY=None)
    assert result.exit_code == 78
    assert "API_KEY is not set" in result.stderr
    assert "API_KEY_FILE" in result.stderr
    assert not server.engine.called.is_set()


@pytest.mark.parametrize(("command", "arguments"), CALLS)
def test_the_key_may_come_from_a_file(
    server: Server, command: click.Command, arguments: list[str], tmp_path: Path
) -> None:
    server.engine.add("plus")
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert server.run(command, *arguments, API_KEY=None, API_KEY_FILE=str(file)).exit_code == 0


@pytest.mark.parametrize(("command", "arguments"), [*CALLS, pytest.param(client.health, [], id="health")])
def test_an_invalid_environment_exits_78(server: Server, command: click.Command, arguments: list[str]) -> None:
    result = server.run(command, *arguments, PORT="many")
    assert result.exit_code == 78
    assert "PORT = 'many'" in result.stderr


@pytest.mark.parametrize(("command", "arguments"), CALLS)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "no such host"])
def test_an_unreachable_server_exits_69_with_address_cause_and_remedy(
    command: click.Command, arguments: list[str], host: str, unused_port: int
) -> None:
    result = invoke(command, *arguments, "--host", host, "--port", str(unused_port), API_KEY=KEY)
    assert result.exit_code == 69
    shown_host = f"[{host}]" if ":" in host else host
    assert f"{shown_host}:{unused_port} is unavailable: " in result.stderr
    assert "--host and --port" in result.stderr


@pytest.mark.parametrize(("command", "arguments"), CALLS)
def test_a_server_that_does_not_answer_exits_69_after_the_timeout(
    command: click.Command, arguments: list[str], deaf_port: int
) -> None:
    result = invoke(command, *arguments, "--port", str(deaf_port), "--timeout", "0.2", API_KEY=KEY)
    assert result.exit_code == 69
    assert f"127.0.0.1:{deaf_port} within 0.2 s" in result.stderr
    assert "--timeout" in result.stderr


@pytest.mark.parametrize(("command", "arguments"), CALLS)
@pytest.mark.parametrize(("status", "code"), [(grpc.StatusCode.UNAVAILABLE, 69), (grpc.StatusCode.INTERNAL, 1)])
def test_the_servers_error_message_is_printed(
    server: Server, command: click.Command, arguments: list[str], status: grpc.StatusCode, code: int
) -> None:
    server.engine.failure = status, "told by\x1bthe server"
    result = server.run(command, *arguments)
    assert result.exit_code == code
    assert r"told by\x1bthe server" in result.stderr


@pytest.mark.parametrize("timeout", ["0", "-1", "1e9", "soon"])
def test_a_timeout_that_is_not_positive_is_refused(server: Server, timeout: str) -> None:
    assert server.run(client.get, "plus", "--timeout", timeout).exit_code == 2


def test_options_take_precedence_over_the_environment(server: Server) -> None:
    server.engine.add("plus")
    result = server.run(
        client.get,
        "plus",
        "--host",
        "127.0.0.1",
        "--port",
        str(server.port),
        PORT="1",
        DEFINITION_SERVER_HOST="no such host",
    )
    assert result.exit_code == 0


@pytest.mark.parametrize("command", [("get", "plus"), ("fetch",)], ids=lambda command: command[0])
def test_ctrl_c_during_a_call_exits_130_without_a_traceback(server: Server, command: tuple[str, ...]) -> None:
    server.engine.gate.clear()
    with spawn(*command, environment=server.environment, stdout=-1, stderr=-1) as process:
        assert server.engine.called.wait(PATIENCE)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_a_full_disk_behind_stdout_exits_1_without_a_traceback(server: Server) -> None:
    server.engine.add("plus")
    with (
        Path("/dev/full").open("wb") as full,
        spawn("get", "plus", environment=server.environment, stdout=full, stderr=-1) as process,
    ):
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert b"cannot write the output: No space left on device" in errors
    assert b"Traceback" not in errors


def test_a_closed_pipe_exits_1_silently(server: Server) -> None:
    server.engine.add("plus")
    reader, writer = os.pipe()
    os.close(reader)
    with spawn("get", "plus", environment=server.environment, stdout=writer, stderr=-1) as process:
        os.close(writer)
        _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (1, b"")


def test_an_output_encoding_without_the_letters_exits_1_with_a_remedy(server: Server) -> None:
    server.engine.add("日本")
    environment = {**server.environment, "PYTHONIOENCODING": "latin-1"}
    with spawn("get", "日本", environment=environment, stdout=-1, stderr=-1) as process:
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert b"PYTHONIOENCODING=utf-8" in errors
    assert b"Traceback" not in errors


# sync


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


def test_sync_out_keeps_every_hostile_name_inside_the_directory_and_apart(server: Server, tmp_path: Path) -> None:
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


def test_sync_out_replaces_a_link_and_leaves_what_it_points_to(server: Server, tmp_path: Path) -> None:
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


# health


def test_health_of_a_serving_server_exits_0_without_a_key(server: Server) -> None:
    result = server.run(client.health, API_KEY=None)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "SERVING\n", "")


def test_health_of_a_server_that_is_not_serving_exits_69(server: Server) -> None:
    server.health.set("", NOT_SERVING)
    result = server.run(client.health)
    assert (result.exit_code, result.stdout) == (69, "NOT_SERVING\n")


def test_health_asks_about_the_service_named(server: Server) -> None:
    server.health.set("avap.DefinitionEngine", NOT_SERVING)
    result = server.run(client.health, "--service", "avap.DefinitionEngine", "--json")
    assert result.exit_code == 69
    assert json.loads(result.stdout) == {
        "server": f"127.0.0.1:{server.port}",
        "service": "avap.DefinitionEngine",
        "status": "NOT_SERVING",
    }


def test_health_of_an_unknown_service_exits_69(server: Server) -> None:
    result = server.run(client.health, "--service", "nobody")
    assert (result.exit_code, result.stdout) == (69, "SERVICE_UNKNOWN\n")


def test_health_prints_an_unknown_status_by_number(server: Server) -> None:
    server.health.set("", 77)
    assert server.run(client.health).stdout == "STATUS_77\n"


def test_health_without_a_server_exits_69_with_the_cause(unused_port: int) -> None:
    result = invoke(client.health, "--json", "--port", str(unused_port))
    assert result.exit_code == 69
    assert json.loads(result.stdout)["status"] == "UNREACHABLE"
    assert f"127.0.0.1:{unused_port} is unavailable" in result.stderr


def test_health_of_a_silent_server_exits_69_after_the_timeout(deaf_port: int) -> None:
    result = invoke(client.health, "--port", str(deaf_port), "--timeout", "0.2")
    assert (result.exit_code, result.stdout) == (69, "")
    assert "within 0.2 s" in result.stderr


@pytest.mark.parametrize("form", [[], ["--watch"]])
def test_health_of_a_server_without_a_health_service_exits_69(form: list[str]) -> None:
    bare = Server()
    bare.health = None
    bare.start()
    try:
        result = bare.run(client.health, *form)
    finally:
        bare.stop()
    assert result.exit_code == 69
    assert "UNIMPLEMENTED" in result.stderr


def test_health_refuses_a_service_that_is_not_utf8(server: Server) -> None:
    assert server.run(client.health, "--service", "\udcff").exit_code == 2


class Watching:
    """``health --watch --json`` in a process of its own, line by line."""

    def __init__(self, environment: dict[str, str | None], *arguments: str) -> None:
        self.process = spawn("health", "--watch", "--json", *arguments, environment=environment, stdout=-1, stderr=-1)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)

    def next(self) -> dict[str, str]:
        told: dict[str, str] = json.loads(self._lines.get(timeout=PATIENCE))
        return told

    def interrupt(self) -> int:
        """Send Ctrl-C and return the exit code. Every state must have been printed, and no traceback."""
        self.process.send_signal(signal.SIGINT)
        code: int = self.process.wait(PATIENCE)
        self._reader.join()
        assert self._lines.empty()
        assert b"Traceback" not in self.process.stderr.read()  # gRPC's own log may mention a GOAWAY
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def watching(server: Server) -> Iterator[Watching]:
    running = Watching(server.environment, "--timeout", str(PATIENCE))
    yield running
    running.close()


def test_a_watch_prints_every_change_until_ctrl_c_and_exits_0(server: Server, watching: Watching) -> None:
    first = watching.next()
    assert first["status"] == "SERVING"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["ts"])
    server.health.set("", NOT_SERVING)
    assert watching.next()["status"] == "NOT_SERVING"
    server.health.set("", SERVING)
    assert watching.next()["status"] == "SERVING"
    assert watching.interrupt() == 0


def test_a_watch_outlives_the_server_and_finds_it_again(server: Server, watching: Watching) -> None:
    assert watching.next()["status"] == "SERVING"
    server.stop()
    gone = watching.next()
    assert gone["status"] == "UNREACHABLE"
    assert gone["cause"]
    server.start()
    assert watching.next()["status"] == "SERVING"
    assert watching.interrupt() == 0


class CountingHealth(health_pb2_grpc.HealthServicer):
    """Every watch sends SERVING once, and then ends if ``ends``. Sets ``often`` at the third watch."""

    def __init__(self, *, ends: bool) -> None:
        self._ends = ends
        self._watches = 0
        self.often = threading.Event()

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        self._watches += 1
        if self._watches == 3:
            self.often.set()
        yield health_pb2.HealthCheckResponse(status=SERVING)
        if not self._ends:
            left = threading.Event()
            context.add_callback(left.set)
            left.wait(PATIENCE)


@pytest.mark.parametrize("ends", [True, False], ids=["the server ends", "fall silent"])
def test_a_watch_is_renewed_silently_where_streams(ends: bool) -> None:
    server = Server()
    server.health = CountingHealth(ends=ends)
    server.start()
    watching = Watching(server.environment, "--timeout", "2")
    try:
        assert watching.next()["status"] == "SERVING"
        assert server.health.often.wait(PATIENCE)
        assert watching.interrupt() == 0  # nothing further was printed
    finally:
        watching.close()
        server.stop()


def test_a_watch_of_a_silent_server_prints_unreachable(deaf_port: int) -> None:
    watching = Watching({**NO_SETTINGS, "PORT": str(deaf_port)}, "--timeout", "0.2")
    try:
        assert watching.next()["status"] == "UNREACHABLE"
        assert watching.interrupt() == 0
    finally:
        watching.close()


def test_a_watch_tries_again_at_growing_but_bounded_intervals(
    unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []

    def sleep(seconds: float) -> None:
        delays.append(seconds)
        if len(delays) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(client.time, "sleep", sleep)
    result = invoke(client.health, "--watch", "--port", str(unused_port))
    assert result.exit_code == 0
    assert result.stdout.count("UNREACHABLE") == 1
    assert delays == sorted(delays)
    assert (delays[0], delays[-1]) == (0.2, 5.0)


def test_a_watch_without_json_prints_a_time_and_a_state_per_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.time, "sleep", sleep)
    server = Server()
    server.health = CountingHealth(ends=True)
    server.start()
    try:
        result = server.run(client.health, "--watch")
    finally:
        server.stop()
    assert result.exit_code == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\S+ SERVING\n", result.stdout)
