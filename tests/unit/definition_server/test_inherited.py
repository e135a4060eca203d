"""Workers and checkers are started with the Python of the server, even if the parent process has given it another
name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import definition_server
from definition_server import inherited
from definition_server.inherited import interpreter

REAL = os.path.realpath(sys.executable)


class Environment:
    """A virtual environment with a Python and another program."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir(parents=True)
        (directory / "pyvenv.cfg").write_text(f"home = {Path(REAL).parent}\n")
        self.python = self.bin / "python"
        self.python.symlink_to(REAL)
        self.program = self.bin / "definition-server"
        self.program.write_text("#!/bin/false\n")
        self.program.chmod(0o755)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    return Environment(tmp_path / "venv")


def test_the_python_that_runs_is_started_by_the_path_that_it_has(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(environment.python))
    assert interpreter() == str(environment.python)


@pytest.mark.parametrize("executable", ["another program", "/nonexistent/python", "", None])
def test_the_python_of_the_environment_is_started_if_argv_0_is_wrong(
    executable: str | None, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = str(environment.program) if executable == "another program" else executable
    monkeypatch.setattr(sys, "executable", given)
    assert interpreter() == str(environment.python)


@pytest.mark.parametrize("executable", ["another python", "/nonexistent/python"])
def test_the_file_of_the_running_interpreter_is_started_if_the_environment_has_another_python(
    executable: str, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.python.unlink()
    environment.python.write_text("#!/bin/false\n")
    environment.python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(environment.python) if executable == "another python" else executable)
    assert interpreter() == REAL


@pytest.mark.parametrize("executable", ["its python", "another program", "/nonexistent/python"])
@pytest.mark.parametrize("missing", ["no /proc", "replaced by an upgrade"])
def test_the_name_of_the_interpreter_decides_if_its_file_is_not_known(
    executable: str, missing: str, environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running = tmp_path / "exe"
    if missing == "replaced by an upgrade":
        running.symlink_to(f"{REAL} (deleted)")
    monkeypatch.setattr(inherited, "_RUNNING", str(running))
    named = {"its python": environment.python, "another program": environment.program}
    monkeypatch.setattr(sys, "executable", str(named.get(executable, executable)))
    assert interpreter() == str(environment.python)


def test_a_process_that_is_named_like_another_program_of_path_starts_a_python_with_its_own_packages(
    environment: Environment,
) -> None:
    program = "import sys; from definition_server.inherited import interpreter; print(interpreter(), sys.executable)"
    where = {"PATH": str(environment.bin), "PYTHONPATH": str(Path(definition_server.__file__).parent.parent)}
    command = ["definition-server", "-c", program]
    ended = subprocess.run(command, executable=REAL, env=where, capture_output=True, text=True, check=True)
    started, misled = ended.stdout.split()
    assert misled == str(environment.program), "this name misleads"
    assert started == str(environment.python)
    prefix = subprocess.run(
        [started, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert prefix.stdout.strip() == str(environment.bin.parent)
