"""Faults caused by clients: a crowd, clients that do not read, resets, known attacks, a flood of wrong keys.

`FULL_FAULTS` have full strength and are for a server that the drill started; `GENTLE_FAULTS` are the same in a strength
that must not affect a server in use. The clients are `attackers`, in a separate process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.chaos.attackers import Job
from tests.chaos.drills.model import Allowance, Fault
from tests.chaos.drills.stage import Stage
from tests.support.attacks import ATTACKS, HONEST

BEGIN_SECONDS = 90.0
"""Time until a fault is in force. Ten thousand connections take longest, some seconds."""
END_SECONDS = 120.0
"""Time for the attackers to end; a round of all attacks takes long."""

_ROOT = Path(__file__).parents[2]


class ClientsFailed(Exception):
    """The clients could not start or did not end; the message is for the reader."""


Told = dict[str, int]
"""Number of events of misbehaving clients, by kind (`attackers.Attackers.done`)."""
Check = Callable[[int, Told], str | None]
"""Connections at a time, events → what is wrong with the events."""


@dataclass(frozen=True, slots=True)
class Misbehaviour:
    """A job for `attackers` and the checks of its result."""

    kind: str
    size: int
    happened: Check
    """Checks that the clients did misbehave."""
    promise: Check | None = None
    """Checks of the promises that hold for these clients too."""
    rate: float = 0.0
    seconds: float = 0.5

    @contextmanager
    def going_on(self, stage: Stage) -> Iterator[None]:
        """The clients misbehave while the block lasts.

        Raises: ClientsFailed: they could not start, or did not end.
        """
        host, _, port = stage.target.rpartition(":")
        job = Job(
            self.kind, host.strip("[]"), int(port), stage.key, _a_name(stage), size=self.size, rate=self.rate,
            seconds=self.seconds, ca_file=(stage.job.ca_file or None) if stage.job else None,
        )  # fmt: skip
        with _Clients(job) as clients:
            clients.wait_started()
            yield
            done = clients.finish()
        if wrong := self.happened(self.size, done):
            raise ClientsFailed(f"{wrong}: {done}")
        if self.promise and (wrong := self.promise(self.size, done)):
            stage.broken.append(f"{wrong}: {done}")


class _Clients:
    """The process of `attackers`, as a context manager; the process has ended afterwards."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._said: dict[str, Told] = {}
        self._other: list[str] = []
        self._started = threading.Event()

    def __enter__(self) -> _Clients:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.attackers"],
            cwd=_ROOT,
            env=dict(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._process.stdin is not None
        self._process.stdin.write(self._job.to_json() + "\n")
        self._process.stdin.flush()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                said: dict[str, Any] = json.loads(line)
            except ValueError:
                self._other.append(line)
                continue
            self._said |= said
            if "started" in said:
                self._started.set()
        self._started.set()  # the process has died, so no caller may wait for it

    def wait_started(self) -> None:
        """Wait until the fault has begun."""
        self._started.wait(BEGIN_SECONDS)
        if "started" not in self._said:
            raise ClientsFailed(f"the clients ({self._job.kind}) did not start: {self._told()}")

    def finish(self) -> Told:
        """End the clients. Returns their report."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise ClientsFailed(f"the clients ({self._job.kind}) do not end") from None
        self._reader.join(10)
        if "done" not in self._said:
            raise ClientsFailed(f"the clients ({self._job.kind}) died: {self._told()}")
        return self._said["done"]

    def _told(self) -> str:
        return "".join(self._other[-20:]).strip() or f"no answer within {BEGIN_SECONDS:g} s"


def _a_name(stage: Stage) -> str:
    """A definition that is served."""
    if stage.table is not None:
        return stage.table.names[0]
    # The name is shorter than 128 octets, because the attackers can write only requests with such names.
    names = stage.job.names if stage.job else []
    return next((name for name in names if len(name.encode()) < 128), "command")


# -- effects that must be seen ----------------------------------------------------------------------------------------


def tried(size: int, done: Told) -> str | None:
    """Every client of a crowd tried to connect."""
    knocked = done.get("connected", 0) + done.get("not connected", 0)
    return None if knocked == size else f"{knocked} of {size} clients tried to connect"


def all_answered(size: int, done: Told) -> str | None:
    """Every client of a crowd got an answer, except for clients that were late themselves
    (`attackers.Attackers.one`)."""
    answered = done.get("grpc-status 0", 0)
    return None if answered + done.get("late", 0) == size else f"{answered} of {size} clients at once were answered"


def tried_keys(size: int, done: Told) -> str | None:
    """Calls with a wrong key were made."""
    return None if _statuses(done) else "no call with a wrong key came to an end"


def all_refused(size: int, done: Told) -> str | None:
    """Every call with a wrong key ended with UNAUTHENTICATED."""
    return None if _statuses(done) <= {"grpc-status 16"} else "wrong keys were not all answered with UNAUTHENTICATED"


def _statuses(done: Told) -> set[str]:
    return {what for what in done if what.startswith("grpc-status") or what == "reset"}


def were_slow(size: int, done: Told) -> str | None:
    """Slow readers read a little."""
    return None if done.get("octets read", 0) > 0 and done.get("connected", 0) >= size else "nobody read slowly"


def did_reset(size: int, done: Told) -> str | None:
    """Connections were reset."""
    return None if done.get("reset", 0) >= size else "hardly a connection was reset"


def all_attacked(size: int, done: Told) -> str | None:
    """Every attack had a connection."""
    missing = [name for name in ATTACKS if name != HONEST and not done.get(name)]
    return f"attacks that found no connection: {', '.join(missing)}" if missing else None


# -- the faults -------------------------------------------------------------------------------------------------------

_FULL = (
    ("client-crowd", "10,000 connections at once", Misbehaviour("crowd", 10_000, tried, all_answered)),
    ("client-slow-readers", "200 clients that hardly read", Misbehaviour("slow readers", 200, were_slow)),
    ("client-resets", "connections reset amid 100 calls", Misbehaviour("resets", 20, did_reset)),
    ("client-attacks", "the HTTP/2 attack table", Misbehaviour("attacks", 1, all_attacked)),
    ("client-wrong-keys", "flood of wrong keys", Misbehaviour("wrong keys", 20, tried_keys, all_refused)),
)
_GENTLE = (
    ("client-crowd-gentle", "200 connections at once", Misbehaviour("crowd", 200, tried, all_answered)),
    ("client-slow-readers-gentle", "8 clients that hardly read", Misbehaviour("slow readers", 8, were_slow)),
    ("client-resets-gentle", "5 resets a second", Misbehaviour("resets", 2, did_reset, rate=5)),
    (
        "client-wrong-keys-gentle", "200 wrong keys a second",
        Misbehaviour("wrong keys", 2, tried_keys, all_refused, rate=200),
    ),
)  # fmt: skip


_FIRST_TIME_MIB = {"client-crowd": 80, "client-slow-readers": 32, "client-resets": 32, "client-attacks": 32}
"""Python and the C library keep the memory of many connections and calls for the next ones: some 5 kB for each of a
crowd, 70 kB for each with 32 calls; 10 MiB in all after resets and after attacks.
"""


def _faults(of: tuple[tuple[str, str, Misbehaviour], ...], *, harms: bool) -> tuple[Fault, ...]:
    return tuple(
        Fault(name, title, "client", each.going_on, harms=harms, first_time_mib=_FIRST_TIME_MIB.get(name))
        for name, title, each in of
    )


FULL_FAULTS = _faults(_FULL, harms=True)
GENTLE_FAULTS = _faults(_GENTLE, harms=False)
FAULTS = FULL_FAULTS + GENTLE_FAULTS


_ON_GRPCIO = {
    "client-crowd": (
        "10,000 connections at once, 1,000 calls/s", Misbehaviour("crowd", 10_000, tried, all_answered, rate=1000),
    ),
    "client-slow-readers": ("20 clients that hardly read", Misbehaviour("slow readers", 20, were_slow)),
    "client-resets": ("10 resets a second, amid 100 calls", Misbehaviour("resets", 4, did_reset, rate=10)),
    "client-wrong-keys": (
        "1,000 wrong keys a second", Misbehaviour("wrong keys", 4, tried_keys, all_refused, rate=1000),
    ),
}  # fmt: skip


def on_transport(fault: Fault, transport: str) -> Fault:
    """``fault`` with the strength and the allowance for ``transport``.

    On grpcio, calls wait during a flood, and when a thousand calls wait for a worker, C-core cancels random calls of
    any client. If this is switched off, a drill needs 7 GB, and calls miss their deadlines. So the strength on grpcio
    is one that a worker can handle. C-core also keeps the memory of calls whose connections were reset or not read (80
    MB a worker after 3 s of resets, and more the next time), so memory is not judged.
    """
    if transport != "grpcio":
        return fault
    title, misbehaviour = _ON_GRPCIO.get(fault.id, (fault.title, None))
    inject = fault.inject if misbehaviour is None else misbehaviour.going_on
    return replace(fault, title=title, inject=inject, allows=Allowance(memory=False))


BEYOND_GRPCIO = ("client-crowd", "client-attacks", "client-wrong-keys")
"""Faults that, in full strength, cost other clients calls on grpcio. Slow readers and resets are not tried in full
strength on grpcio. With 200 slow readers of 0.6 MB the workers grew to 3.8 GB, because all requested answers are kept
for them. A few seconds of resets had the same effect, and no client was answered in time.
"""
