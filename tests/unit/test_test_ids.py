"""Every runner can run the tests: ids are printable ASCII, and a log message of a test cannot abort a run on several
processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import is_portable_id

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("character", ["\n", "\x00", "\x7f", "\u00f1", "\U0001f40d", "\udcff"])
def test_an_id_of_other_characters_is_not_portable(character: str) -> None:
    assert is_portable_id("tests/unit/test_a.py::test_b[c d-1]")
    assert not is_portable_id(f"tests/unit/test_a.py::test_b[{character}]")


def run_pytest(path: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    path.write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(path.parent)]
    return subprocess.run(
        [*command, "-p", "tests.conftest", "-p", "no:cacheprovider", *options, str(path)],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.thorough  # starts pytest
def test_a_test_whose_id_is_not_portable_is_refused_at_collection(tmp_path: Path) -> None:
    done = run_pytest(tmp_path / "test_it.py", "def test_a\u00f1o(): pass\n", "-p", "no:xdist")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert r"test ids must be printable ASCII" in done.stderr
    assert r"test_a\xf1o" in done.stderr


@pytest.mark.thorough  # starts pytest
def test_a_captured_lone_surrogate_does_not_abort_a_parallel_run(tmp_path: Path) -> None:
    source = "import logging\ndef test_it():\n    logging.warning('\\udcff')\n    assert 0, '\\udcff'\n"
    done = run_pytest(tmp_path / "test_it.py", source, "-n", "1")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "1 failed" in done.stdout
