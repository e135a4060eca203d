"""``get`` against a gRPC server in this process, and the handling of keys, errors and signals that all client commands
share."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
from pathlib import Path

import click
import grpc
import pytest
from tests.unit.definition_server.cli.command_server import CODE, KEY, PATIENCE, Server, invoke, on_a_terminal, spawn

from definition_server.catalog.signing import Signer
from definition_server.cli import client


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
def test_get_through_a_pipe_has_no_colours_even_if_they_are_forced(server: Server, force: str | None) -> None:
    server.engine.add("plus")
    assert "\x1b" not in server.run(client.get, "plus", FORCE_COLOR=force).stdout


def test_get_json_is_one_object_with_the_code_as_text(server: Server) -> None:
    server.engine.add("plus")
    assert json.loads(server.run(client.get, "plus", "--json").stdout) == {
        "id": None,
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


def test_get_shows_the_payload_of_a_signed_package_and_that_it_is_signed(server: Server) -> None:
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
    assert "fetch --out DIR" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("host", ["127.0.0.1:50051", "defs.example:50051", "[::1]:50051"])
def test_a_host_with_a_port_exits_78_and_names_the_option_of_the_port(server: Server, host: str) -> None:
    result = server.run(client.get, "nope", "--host", host)
    assert result.exit_code == 78
    assert "a port is given by --port (PORT)" in result.stderr


def test_get_accepts_a_name_like_an_option_after_two_dashes(server: Server) -> None:
    server.engine.add("--json")
    assert server.run(client.get, "--", "--json").exit_code == 0


def test_get_refuses_json_together_with_code_only(server: Server) -> None:
    assert server.run(client.get, "plus", "--json", "--code-only").exit_code == 2


def test_get_refuses_a_name_that_is_not_utf8(server: Server) -> None:
    result = server.run(client.get, "\udcff")
    assert result.exit_code == 2
    assert "UTF-8" in result.stderr


# Common to get and sync


CALLS = [pytest.param(client.get, ["plus"], id="get"), pytest.param(client.fetch, [], id="fetch")]


@pytest.mark.parametrize(("command", "arguments"), CALLS)
def test_a_wrong_key_exits_4_and_names_the_variable(
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


def test_stdout_on_a_full_disk_exits_1_without_a_traceback(server: Server) -> None:
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


def test_an_output_encoding_that_lacks_a_letter_exits_1_with_a_remedy(server: Server) -> None:
    server.engine.add("日本")
    environment = {**server.environment, "PYTHONIOENCODING": "latin-1"}
    with spawn("get", "日本", environment=environment, stdout=-1, stderr=-1) as process:
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert b"PYTHONIOENCODING=utf-8" in errors
    assert b"Traceback" not in errors
