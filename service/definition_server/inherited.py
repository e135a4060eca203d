"""Corrects what a process inherits from its parent: descriptors 0 to 2, actions of signals, the mode of new files, and
its name. Each may differ from what a program expects.

If the parent has closed stdin, stdout or stderr, the next descriptor that is opened, for instance a listening socket,
takes its number, and output to stderr is written to it. Signals reach whole process groups (systemd's default, a
terminal's Ctrl-C and hang-up, ``dumb-init``), while only the master decides what a signal means. If the parent ignores
SIGCHLD, the kernel reaps the workers, and their exit codes are lost. A umask may deny the owner access to new files
(the next start could not read the stored catalogue), or allow access to other users.
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
"""Signals that have no meaning for the server, and that would end or stop it by default."""

MASTERS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR2})
"""Signals that the master handles and its workers ignore."""


_RUNNING = "/proc/self/exe"
"""The link to the file that the kernel executes."""


def interpreter() -> str:
    """The path of the running Python, to start further processes with it.

    ``sys.executable`` is derived from argv[0], which the parent may set to any text. Python searches for it in PATH,
    where it may find another program. So the path is compared with the file that the kernel executes. If they differ,
    the virtual environment's own Python is preferred to that file, because it finds the same packages.

    Without /proc, or if an upgrade has removed that file, ``sys.executable`` is used.
    """
    # This code does not use pathlib, whose import would take a sixth of a checker's import time.
    environment = os.path.join(sys.prefix, "bin")
    paths = (sys.executable or "", f"{environment}/python", f"{environment}/python3")
    for path in paths:
        with suppress(OSError):
            if os.path.samefile(_RUNNING, path):
                return path
    with suppress(OSError):
        target = os.readlink(_RUNNING)
        if os.path.exists(target):
            return target
    for path in paths:
        if os.path.basename(path).startswith("python") and os.access(path, os.X_OK):
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
    """Open /dev/null in the place of each of descriptors 0 to 2 that is closed. To be called before any file is opened.

    Python's own ``sys.stdin``, ``sys.stdout`` and ``sys.stderr``, which are None then, are opened as well.

    Raises:
        NoNullDevice: if a descriptor is closed and /dev/null cannot be opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = _open_null()
            if opened != number:  # never reached: this loop opens the lower descriptors first
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - the same
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - the same


class EarlySignals:
    """Signals that arrive while the master starts. Each signal is recorded once, and handled as soon as the master
    runs."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    def install(self) -> None:
        """Begin to record."""
        for number in MASTERS:
            signal.signal(number, self._record)
        for number in UNUSED:
            signal.signal(number, signal.SIG_IGN)

    def _record(self, number: int, _: object) -> None:
        if number not in self.received:
            self.received.append(signal.Signals(number))

    def take(self) -> list[signal.Signals]:
        """Return the recorded signals, and empty the record."""
        taken, self.received = self.received, []
        return taken


early_signals = EarlySignals()
"""The recorded signals of this process."""


_SERVERS = ("serve", "demo")
_UMASK = 0o077
"""The umask by which only the server's account can access the files that it writes."""


def prepare() -> None:
    """Prepare a process of the command line: reserve descriptors and, if it is to be a server, record signals, reset
    SIGCHLD and restrict the mode of its files. Ends the process with 78 if it needs /dev/null and there is none."""
    server = bool(sys.argv[1:2]) and sys.argv[1] in _SERVERS
    try:
        reserve_standard_descriptors()
        if server:
            os.close(_open_null())
    except NoNullDevice as error:
        with suppress(OSError):  # stderr may be closed
            os.write(2, f"Error: {error}\n".encode())
        sys.exit(os.EX_CONFIG)
    if server:
        early_signals.install()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.umask(_UMASK)


def leave_signals_to_the_master() -> None:
    """For a worker: ignore every signal that the master handles or that has no meaning for the server."""
    for number in MASTERS | UNUSED:
        signal.signal(number, signal.SIG_IGN)
    # This also discards signals that have arrived since the process was started.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MASTERS)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """A block in which a worker is started: signals wait until the worker ignores them, instead of ending it during its
    start.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, MASTERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, MASTERS)
