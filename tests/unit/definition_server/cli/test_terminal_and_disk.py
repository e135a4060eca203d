"""The output of the commands to a full disk, to a closed pipe, and to a narrow terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.environment import inherited_environment
from tests.unit.definition_server.cli.command_server import Server, on_a_terminal

from definition_server.cli import client
from definition_server.cli.main import cli

PROGRAM = [sys.executable, "-m", "definition_server"]
SETTINGS: dict[str, str] = {"DATABASE_URL": "postgresql://u@db/avap", "API_KEY": "key"}
COMMANDS = ["--help", "config", "config --json", "proto"]
LONG = b"x = [" + b"'one of many words', " * 12 + b"]\n\tnever = 'broken'\n"


def environment(**more: str) -> dict[str, str]:
    return inherited_environment() | SETTINGS | more


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", COMMANDS)
def test_output_to_a_full_disk_is_one_line_and_exit_code_1(command: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PROGRAM, *command.split()], env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "Error: cannot write the output: No space left on device\n")


@pytest.mark.parametrize("command", ["--help", "config"])
def test_output_to_a_closed_pipe_ends_silently(command: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as pipe:
        done = subprocess.run(
            [*PROGRAM, *command.split()], env=environment(), stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "")


INTERRUPTED = """
import os, signal, sys

module = sys.argv[1]

class Interrupt:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
sys.meta_path.insert(0, Interrupt())
from definition_server.cli import run

sys.argv[:] = ["definition-server", *sys.argv[2:]]
run()
"""


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("click", "--help"),
        ("definition_server.settings", "status 127.0.0.1:1"),
        ("definition_server.cli.client", "health --watch"),
        ("definition_server.cli.fleet", "status 127.0.0.1:1"),
        ("definition_server.cli.capacity", "capacity --rps 1"),
    ],
)
def test_ctrl_c_while_modules_are_imported_ends_silently_with_130(module: str, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, *command.split()], env=environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def shown_at(columns: int, *arguments: str, **more: str) -> list[str]:
    """The lines of a command whose stdout and stderr are a terminal, without colours."""
    controller, terminal = pty.openpty()
    wide = {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    with os.fdopen(controller, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [*PROGRAM, *arguments], env=inherited_environment() | wide | more, stdout=terminal, stderr=terminal
        )
        os.close(terminal)
        octets = b""
        try:
            while part := screen.read(65_536):
                octets += part
        except OSError:  # EIO: the command has closed the terminal
            pass
        process.wait()
    return re.sub(r"\x1b\[[0-9;]*m", "", octets.decode()).replace("\r", "").split("\n")


@pytest.mark.parametrize(
    ("columns", "command"),
    [
        (80, "serve"),  # a long error: required variables are missing
        (120, "serve"),
        (40, "serve"),
        (40, "capacity --rps 35000 --replicas 3"),
        (40, "pin --help"),
        (80, "capacity --rps 35000 --replicas 3"),
        (80, "capacity --rps nonsense-that-is-long-enough-to-fill-more-than-eighty-columns-with-its-explanation"),
    ],
)
def test_help_errors_and_results_are_wrapped_at_words(columns: int, command: str) -> None:
    lines = shown_at(columns, *command.split())
    for line in lines:
        assert len(line) <= columns or len(max(line.split(), key=len)) > columns - 20, line
    # No line begins with the second half of a word: the joined lines equal the output in a pipe.
    piped = subprocess.run(
        [*PROGRAM, *command.split()], env=inherited_environment() | {"COLUMNS": str(columns)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert " ".join(lines).split() == (piped.stderr + piped.stdout).split()


@pytest.mark.parametrize("name", ["fetsh", "Serve", "healht", "snapshots", "statis"])
def test_an_unknown_command_is_answered_with_the_nearest_name(name: str) -> None:
    done = CliRunner().invoke(cli, [name])
    assert done.exit_code == 2
    assert f"No such command '{name}'. Did you mean '" in done.output


def test_a_misspelled_setting_is_named_together_with_the_missing_setting() -> None:
    nothing = {"API_KEY": None, "API_KEY_FILE": None, "API_KEYS": None, "API_KEYS_FILE": None, "API_KEYY": "x"}
    done = CliRunner().invoke(cli, ["config"], env=SETTINGS | nothing)
    assert done.exit_code == 78
    assert "API_KEYY: the server does not read it; did you mean API_KEY" in done.stderr


def test_config_notes_a_misspelled_setting_and_prints_the_others() -> None:
    done = CliRunner().invoke(cli, ["config", "--json"], env=SETTINGS | {"SNAPSHOT_DIRR": "/x"})
    assert done.exit_code == 0
    assert "Note: SNAPSHOT_DIRR: the server does not read it; did you mean SNAPSHOT_DIR?" in done.stderr


def test_get_on_a_narrow_terminal_shows_every_line_of_code_whole(server: Server) -> None:
    server.engine.add("long", code=LONG)
    shown = on_a_terminal("get", "long", environment={**server.environment, "COLUMNS": "60"})
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r\n", "\n")
    assert LONG.decode().expandtabs(8) in plain.expandtabs(8)


def test_get_in_a_pipe_does_not_wrap_the_code(server: Server) -> None:
    server.engine.add("long", code=LONG)
    assert server.run(client.get, "long", COLUMNS="60").stdout.endswith("\n" + LONG.decode())
    assert server.run(client.get, "long", "--code-only", COLUMNS="60").stdout_bytes == LONG


def test_completion_of_commands_and_options_works_as_documented() -> None:
    script = subprocess.run(
        PROGRAM, env=environment(_DEFINITION_SERVER_COMPLETE="bash_source"), capture_output=True, text=True, check=True
    )
    assert "complete -o nosort -F _definition_server_completion definition-server" in script.stdout
    for words, number, expected in (
        ("definition-server sn", "1", "snapshot"),
        ("definition-server get --co", "2", "--code-only"),
    ):
        asked = environment(_DEFINITION_SERVER_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=number)
        done = subprocess.run(PROGRAM, env=asked, capture_output=True, text=True, check=True)
        assert f"plain,{expected}\n" in done.stdout
