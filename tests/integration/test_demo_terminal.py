"""The demo on a terminal: it ends with its terminal or on a signal, and leaves no process and no file behind."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
from tests.support.environment import inherited_environment
from tests.support.families import sample
from tests.support.polling import until
from tests.support.providers import need_provider

pytestmark = [pytest.mark.slow, pytest.mark.transports("native")]

SIGNALS_OF_KEYS = {"Ctrl-C": b"\x03", "Ctrl-backslash": b"\x1c"}


class DemoOnATerminal:
    """``definition-server demo`` as the leader of a session whose terminal is a pty."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        kept = inherited_environment()
        self._terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "definition_server", "demo"],
            env=kept | {"PORT": "0", "METRICS_PORT": "0", "WORKERS": "1", "TMPDIR": str(temporary)},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # Opening the pty makes it the controlling terminal.
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(theirs)
        self.output = ""
        self._open = True

    def reads(self, pattern: str) -> bool:
        """Whether ``pattern`` is on the terminal."""
        while self._open and select.select([self._terminal], [], [], 0)[0]:
            try:
                self.output += os.read(self._terminal, 65_536).decode(errors="replace")
            except OSError:  # EIO: no process has the other side open any more
                break
        return re.search(pattern, self.output) is not None

    def press(self, key: str) -> None:
        assert termios.tcgetattr(self._terminal)[3] & termios.ISIG
        os.write(self._terminal, SIGNALS_OF_KEYS[key])

    def close_terminal(self) -> None:
        """Close the terminal, as if its window was closed: the session's leader gets SIGHUP, and reads and writes fail
        with EIO."""
        if self._open:
            self._open = False
            os.close(self._terminal)

    def processes(self) -> list[str]:
        """Command lines of the processes of its session, and of those that work in its temporary directory."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                directory = str((entry / "cwd").readlink())
            except OSError:
                continue
            ours = int(fields[3]) == self.process.pid or directory.startswith(f"{self.temporary}/")
            if ours and fields[0] != "Z":
                found.append(f"{entry.name} {line or directory}")
        return found

    def end(self) -> None:
        self.close_terminal()
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory that PostgreSQL's user may enter, unlike pytest's own."""
    made = Path(tempfile.mkdtemp(prefix="demo-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def demo(temporary: Path) -> Iterator[DemoOnATerminal]:
    need_provider("embedded")
    started = DemoOnATerminal(temporary)
    yield started
    started.end()


ENDS: dict[str, Callable[[DemoOnATerminal], None]] = {
    "terminal closed": DemoOnATerminal.close_terminal,
    "SIGHUP to the group": lambda demo: os.killpg(demo.process.pid, signal.SIGHUP),
    "Ctrl-C": lambda demo: demo.press("Ctrl-C"),
    "Ctrl-backslash": lambda demo: demo.press("Ctrl-backslash"),
}


@pytest.mark.thorough  # takes seconds
@pytest.mark.parametrize(
    ("how", "when"),
    sample(
        product(ENDS, ("PostgreSQL starts", "serving")),
        [("terminal closed", "serving"), ("Ctrl-C", "PostgreSQL starts")],
        unpack=True,
    ),
)
def test_the_end_of_the_terminal_or_a_key_ends_the_demo_and_leaves_nothing(
    how: str, when: str, demo: DemoOnATerminal
) -> None:
    if when == "serving":
        until(lambda: demo.reads(r"Serving"), lambda: demo.output)
        assert list(demo.temporary.iterdir()), "it has its data there"
    else:
        until(lambda: any(demo.temporary.iterdir()), lambda: demo.output)
    ENDS[how](demo)

    def ended() -> bool:
        demo.reads("")
        return demo.process.poll() is not None

    until(ended, lambda: f"the demo ends: {demo.output}", seconds=30)
    assert demo.process.returncode == 0
    assert "Traceback" not in demo.output
    until(lambda: not demo.processes(), lambda: f"left behind: {demo.processes()}", seconds=20)
    assert not list(demo.temporary.iterdir())
