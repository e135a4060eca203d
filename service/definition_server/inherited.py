"""The inheritance of a process from the one that starts it: descriptors 0 to 2, actions of signals, mode of new files,
and its name.

Each may be other than a program expects. A parent may have closed stdin, stdout or stderr: the next descriptor that is
opened would then take its number, a listening socket for instance, and whatever writes to stderr writes there. And
signals reach whole process groups (systemd's default, a terminal's Ctrl-C and hang-up, ``dumb-init``), while only the
master decides what a signal means. A parent that ignores SIGCHLD has the kernel reap the workers, whose exit codes are
then lost. And a umask may take a file's own rights away (the next start could not read the stored catalogue), or none
from others.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

UNUSED = frozenset(
    {
        signal.SIGUSR1,
        signal.SIGALRM,
        signal.SIGVTALRM,
        signal.SIGPROF,
        signal.SIGIO,
        signal.SIGPWR,
        signal.SIGTTOU,
    }
)
"""Signals that mean nothing to the server, and that would end or stop it by default."""

MASTERS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR2})
"""Signals that the master acts on, and its workers do not."""


_RUNNING = "/proc/self/exe"
"""The file that the kernel executes."""


def interpreter() -> str:
    """The path of the Python that runs, to start others of it.

    ``sys.executable`` is derived from argv[0], which may be any text: the parent chooses it. Python looks for it in
    PATH, where it may find another program. Hence the path is compared with the file that the kernel executes. Where it
    is another, the virtual environment's own Python is preferred to that file: it finds the same packages.

    Without /proc, and where that file is gone because an upgrade has replaced it, the name decides.
    """
    # Without pathlib: its import is a sixth of what a checker process imports.
    environment = os.path.join(sys.prefix, "bin")  # noqa: PTH118
    paths = (sys.executable or "", f"{environment}/python", f"{environment}/python3")
    for path in paths:
        with suppress(OSError):
            if os.path.samefile(_RUNNING, path):  # noqa: PTH121
                return path
    with suppress(OSError):
        target = os.readlink(_RUNNING)  # noqa: PTH115
        if os.path.exists(target):  # noqa: PTH110
            return target
    for path in paths:
        if os.path.basename(path).startswith("python") and os.access(path, os.X_OK):  # noqa: PTH119
            return path
    return sys.executable


class NoNullDevice(Exception):
    """/dev/null cannot be opened. The message says why, and what to do."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"{os.devnull} cannot be opened for reading and writing ({error.strerror}): workers and closed standard "
            f"streams need it. Make it with `mknod -m 666 {os.devnull} c 1 3`, on a file system without nodev."
        )


def _open_null() -> int:
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError as error:
        raise NoNullDevice(error) from error


def reserve_standard_descriptors() -> None:
    """Open /dev/null in the place of each of descriptors 0 to 2 that is closed. To be called before anything is opened.

    Python's own ``sys.stdin``, ``sys.stdout`` and ``sys.stderr``, which are None then, are opened as well.

    Raises:
        NoNullDevice: where one is closed, and /dev/null cannot be opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = _open_null()
            if opened != number:  # a lower one is free: it comes first in this loop, so this cannot be
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


class EarlySignals:
    """Signals that arrive while the master starts. Each is recorded once, and acted on once it runs."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    def install(self) -> None:
        """Record from now on."""
        for number in MASTERS:
            signal.signal(number, self._record)
        for number in UNUSED:
            signal.signal(number, signal.SIG_IGN)

    def _record(self, number: int, _: object) -> None:
        if number not in self.received:
            self.received.append(signal.Signals(number))

    def take(self) -> list[signal.Signals]:
        """What was recorded, once."""
        taken, self.received = self.received, []
        return taken


early_signals = EarlySignals()
"""Of this process."""


_SERVERS = ("serve", "demo")
_UMASK = 0o077
"""Files that a server writes are its own."""


def prepare() -> None:
    """Begin a process of the command line: reserve descriptors and, where it is to be a server, record signals, watch
    its children and keep its files to itself. Ends the process with 78 where it needs /dev/null, and there is none."""
    server = bool(sys.argv[1:2]) and sys.argv[1] in _SERVERS
    try:
        reserve_standard_descriptors()
        if server:
            os.close(_open_null())
    except NoNullDevice as error:
        with suppress(OSError):  # stderr may be what is closed
            os.write(2, f"Error: {error}\n".encode())
        sys.exit(os.EX_CONFIG)
    if server:
        early_signals.install()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.umask(_UMASK)


def leave_signals_to_the_master() -> None:
    """For a worker: ignore every signal that the master acts on, or that means nothing."""
    for number in MASTERS | UNUSED:
        signal.signal(number, signal.SIG_IGN)
    # A signal that came since the process was started is discarded with this.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MASTERS)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Start a worker within this block: signals wait until it ignores them, instead of ending a Python that starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, MASTERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, MASTERS)
