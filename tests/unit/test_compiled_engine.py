"""`hatch_build.py`: wheels with compiled modules, and the pure wheel if the modules cannot be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import pytest

import grpc_h2
from grpc_h2 import Connection

ROOT = Path(__file__).parents[2]
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "tiny"
version = "1"
requires-python = ">=3.11"
[tool.hatch.build.targets.wheel]
packages = ["src/tiny"]
[tool.hatch.build.targets.wheel.hooks.custom]
requires = ["mypy", "setuptools"]
sources = "src"
modules = ["tiny/[a-z]*.py"]
"""
PURE = "tiny-1-py3-none-any.whl"

can_compile = pytest.mark.skipif(
    find_spec("mypyc") is None
    or shutil.which(str(sysconfig.get_config_var("CC")).split()[0]) is None
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="mypyc (extra dev), a C compiler, or Python's headers are missing; nox -s compiled has them all",
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package of one module, with the build of this project."""
    root = tmp_path / "project"
    (root / "src/tiny").mkdir(parents=True)
    (root / "pyproject.toml").write_text(PROJECT)
    shutil.copy(ROOT / "hatch_build.py", root)
    (root / "src/tiny/__init__.py").touch()
    (root / "src/tiny/doubled.py").write_text("def doubled(number: int) -> int:\n    return 2 * number\n")
    return root


def build(project: Path, **variables: str) -> tuple[list[Path], str, int]:
    """The wheels, the output, and the exit code."""
    done = subprocess.run(
        [sys.executable, "-B", "-m", "hatchling", "build", "-t", "wheel", "-d", str(project / "dist")],
        cwd=project,
        env={name: value for name, value in os.environ.items() if name not in ("CC", "COMPILED_ENGINE")} | variables,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return sorted((project / "dist").glob("*.whl")), done.stdout + done.stderr, done.returncode


def program(folder: Path, name: str, text: str) -> str:
    """The path of a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("value", ["", "0"])
def test_a_build_without_the_request_to_compile_makes_the_pure_wheel(project: Path, value: str) -> None:
    wheels, printed, code = build(project, COMPILED_ENGINE=value, CC="/nonexistent/cc")
    assert ([wheel.name for wheel in wheels], code) == ([PURE], 0)
    assert "COMPILED_ENGINE" not in printed


@pytest.mark.slow
@can_compile
def test_a_compiled_wheel_holds_modules_and_sources_and_is_for_this_python_only(project: Path) -> None:
    [wheel], printed, code = build(project, COMPILED_ENGINE="1")
    assert code == 0, printed
    version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert wheel.name.startswith(f"tiny-1-{version}-{version}-linux_")
    site = project / "site"
    zipfile.ZipFile(wheel).extractall(site)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    names = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {name for name in names if "dist-info" not in name} == {
        "tiny/__init__.py", "tiny/doubled.py", f"tiny/doubled{suffix}", f"tiny__mypyc{suffix}"
    }  # fmt: skip

    def shown(what: str) -> str:
        command = f"from tiny import doubled; print({what})"
        return subprocess.run(
            [sys.executable, "-c", command], cwd=site, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert shown("doubled.doubled(21), doubled.__file__.endswith('.so')") == "42 True"
    # With the tag of another Python, the sources run.
    for path in site.rglob("*.so"):
        path.rename(path.with_name(path.name.replace(str(suffix), ".cpython-399-x86_64-linux-gnu.so")))
    assert shown("doubled.doubled(21), doubled.__file__.endswith('.so')") == "42 False"


CANNOT = {
    "missing": ("", "there is no C compiler"),
    "failing": ("echo 'cc1: internal compiler error' >&2; exit 1", "rror"),
    "silent": ("exit 0", "rror"),
}


@can_compile
@pytest.mark.parametrize(
    "why", ["missing", *(pytest.param(each, marks=pytest.mark.slow) for each in ("failing", "silent"))]
)
def test_the_wheel_is_pure_and_one_line_gives_the_reason_if_there_is_no_working_compiler(
    project: Path, why: str
) -> None:
    text, reason = CANNOT[why]
    compiler = program(project, "cc", text) if text else "/nonexistent/cc"
    wheels, printed, code = build(project, COMPILED_ENGINE="1", CC=compiler)
    assert ([wheel.name for wheel in wheels], code) == ([PURE], 0), printed
    [line] = [line for line in printed.splitlines() if "COMPILED_ENGINE" in line]
    assert reason in line
    assert line.endswith("; the wheel has the pure Python form")


def test_a_build_that_requires_the_compiled_form_fails_without_a_compiler(project: Path) -> None:
    wheels, printed, code = build(project, COMPILED_ENGINE="required", CC="/nonexistent/cc")
    assert wheels == []
    assert code != 0
    assert "COMPILED_ENGINE=required: there is no C compiler '/nonexistent/cc'" in printed


@pytest.mark.slow
@can_compile
def test_modules_that_mypyc_refuses_leave_the_wheel_pure(project: Path) -> None:
    (project / "src/tiny/doubled.py").write_text("def doubled(number: int) -> int:\n    return 'two'\n")
    wheels, printed, _ = build(project, COMPILED_ENGINE="1")
    assert [wheel.name for wheel in wheels] == [PURE]
    [line] = [line for line in printed.splitlines() if "COMPILED_ENGINE" in line]
    assert "Incompatible return value" in line


@pytest.mark.slow
@can_compile
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import sys\nassert 'tiny.doubled' in sys.modules", "tiny.tripled, imported first, ends its process with 1"),
        ("import os\nos.abort()", "tiny.tripled, imported first, ends its process with -6"),
    ],
    ids=["needs another", "aborts"],
)
def test_a_compiled_module_that_cannot_be_imported_first_leaves_the_wheel_pure(
    project: Path, line: str, reason: str
) -> None:
    (project / "src/tiny/tripled.py").write_text(f"{line}\n")
    wheels, printed, _ = build(project, COMPILED_ENGINE="1")
    assert [wheel.name for wheel in wheels] == [PURE]
    assert reason in printed


def test_the_engine_names_the_form_that_runs() -> None:
    assert (grpc_h2.ENGINE == "pure") == isinstance(Connection.receive_data, FunctionType)
    assert grpc_h2.ENGINE in ("pure", "compiled")
