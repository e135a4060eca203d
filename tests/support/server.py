"""A real definition server as a child process, started as an operator would start it, with its logs, metrics and
processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families
from tests.support.polling import POLL_SECONDS, until

KEY = "test-key"
_INHERITED = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")

FAST = {
    "HOST": "127.0.0.1",
    "PORT": "0",
    "METRICS_PORT": "0",
    "WORKERS": "2",
    "API_KEY": KEY,
    "SYNC_INTERVAL_SECONDS": "0.2",
    "CONNECT_TIMEOUT_SECONDS": "2",
    "STATEMENT_TIMEOUT_SECONDS": "2",
    "DRAIN_WAIT_SECONDS": "0",
    "DRAIN_TIMEOUT_SECONDS": "10",
}
"""The default settings of a test's server."""

CHECKER = b"control_plane.checker_process"
"""Part of the command line of the process that judges rows."""

LogLine = dict[str, Any]


class ServerProcess:
    """``definition-server serve`` in its own process group. A context, which leaves nothing behind."""

    def __init__(self, database_url: str, **settings: str) -> None:
        kept = {k: v for k, v in os.environ.items() if k in _INHERITED or k.startswith("COVERAGE_")}
        self.environment = kept | FAST | {"DATABASE_URL": database_url} | settings
        if any(name.startswith("COVERAGE_") for name in kept) or os.geteuid() != 0:
            # The jail is off: a process writes its coverage when it ends, which a confined process cannot do. Also,
            # many tests read the memory and descriptors of a process, which an ordinary account cannot do if the
            # process is hidden.
            self.environment.setdefault("JAIL", "off")
        self.command = [sys.executable, "-m", "definition_server", "serve"]
        self.directory: Path | None = None
        """Its working directory; None: that of the test."""
        self.lines: list[LogLine] = []
        self.other_output: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> Self:
        """Start the process; it may take a while until it serves (`wait_ready`)."""
        assert self._process is None or self._process.poll() is not None, (
            "the server runs already: a second process would outlive the test"
        )
        self._process = subprocess.Popen(
            self.command,
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,))
        self._reader.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    def end(self) -> None:
        """End it by SIGTERM if it still runs, then by force. Fails if processes of its group are left."""
        process = self._process
        if process is None:
            return
        try:
            if process.poll() is None:
                for pid in self.worker_pids():
                    os.kill(pid, signal.SIGCONT)
                process.terminate()
                process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the server did not end on SIGTERM:\n{self.tail()}") from None
        finally:
            self._kill_group(process.pid)
            assert self._reader is not None
            self._reader.join(10)
            assert process.stdout is not None
            process.stdout.close()
            self._process = None

    def _kill_group(self, group: int) -> None:
        """Wait for orphaned workers to drain; kill and report those that do not end in time."""
        deadline = time.monotonic() + 15
        while _group_exists(group):
            if time.monotonic() > deadline:
                os.killpg(group, signal.SIGKILL)
                raise AssertionError(f"processes of the server outlived it:\n{self.tail()}")
            time.sleep(POLL_SECONDS)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                parsed = json.loads(line)
            except ValueError:
                self.other_output.append(line)
            else:
                self.lines.append(parsed)

    # -- its log -----------------------------------------------------------------------------------------------

    def logged(self, message: str, *, after: int = 0, **fields: Any) -> list[LogLine]:
        """Log lines with that ``msg`` (and those fields), from line number ``after`` on."""
        return [
            line
            for line in self.lines[after:]
            if line.get("msg") == message and all(line.get(k) == v for k, v in fields.items())
        ]

    def wait_log(self, message: str, *, after: int = 0, seconds: float = 30, **fields: Any) -> LogLine:
        """Wait for such a line and return the first."""
        return until(
            lambda: self.logged(message, after=after, **fields),
            lambda: f"log line {message!r} {fields}:\n{self.tail()}",
            seconds=seconds,
        )[0]

    def tail(self, count: int = 40) -> str:
        """The last output, for a failing test."""
        return "\n".join([*(json.dumps(line) for line in self.lines[-count:]), *self.other_output[-count:]])

    # -- its processes and ports -------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Process id of the master."""
        assert self._process is not None
        return self._process.pid

    @property
    def port(self) -> int:
        """The gRPC port."""
        return int(self.wait_log("Starting")["address"].rpartition(":")[2])

    @property
    def metrics_port(self) -> int:
        """The admin HTTP port."""
        return int(self.wait_log("Starting")["metrics_port"])

    def worker_pids(self) -> list[int]:
        """Live worker processes."""
        return self._children(but=CHECKER)

    def checker_pids(self) -> list[int]:
        """Live checker processes."""
        return self._children(only=CHECKER)

    def _children(self, *, only: bytes = b"", but: bytes = b"\0\0") -> list[int]:
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        try:
            pids = sorted(int(pid) for path in tasks for pid in path.read_text().split())
            lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
        except OSError:
            return []
        return [pid for pid, line in lines.items() if only in line and but not in line]

    # -- its admin HTTP ----------------------------------------------------------------------------------------

    def http(self, path: str) -> tuple[int, str]:
        """Status and body of the admin HTTP server."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def statusz(self) -> dict[str, Any]:
        """``/statusz``."""
        status: dict[str, Any] = json.loads(self.http("/statusz")[1])
        return status

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of ``/metrics``."""
        for family in text_string_to_metric_families(self.http("/metrics")[1]):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        raise AssertionError(f"no sample {name}{labels}")

    def wait_metric(self, value: float, name: str, **labels: str) -> None:
        """Wait until a sample has that value, because calls are counted after their answers have been sent."""
        until(
            lambda: self.metric(name, **labels) == value,
            lambda: f"{name}{labels} = {value}, it is {self.metric(name, **labels)}",
            seconds=10,
        )

    # -- waiting -----------------------------------------------------------------------------------------------

    def wait_ready(self, seconds: float = 30) -> Self:
        """Wait until every worker serves a catalogue."""
        self.wait_log("Serving", seconds=seconds)
        return self

    def wait_version(self, version_hash: str, seconds: float = 30) -> None:
        """Wait until every worker serves that version."""
        until(
            lambda: {worker["version_hash"] for worker in self.statusz()["workers"]} == {version_hash},
            lambda: f"version {version_hash} on all workers:\n{self.tail()}",
            seconds=seconds,
        )

    def wait_count(self, definitions: int, seconds: float = 30) -> None:
        """Wait until every worker serves that number of definitions."""
        until(
            lambda: {worker["definitions"] for worker in self.statusz()["workers"]} == {definitions},
            lambda: f"{definitions} definitions on all workers:\n{self.tail()}",
            seconds=seconds,
        )

    def wait_exit(self, seconds: float = 20) -> int:
        """Wait until the master has ended. Returns its exit code."""
        assert self._process is not None
        return self._process.wait(seconds)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the master."""
        os.kill(self.pid, number)


def _group_exists(group: int) -> bool:
    """Whether any process of the group lives (zombies do not count)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False
