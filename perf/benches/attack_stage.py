"""A whole server under attack, with its attackers and its victim, each a process."""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import wire
from tests.support.certificates import Certificate
from tests.support.client import Client
from tests.support.client import Tls as ClientTls
from tests.support.polling import until
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

from perf.attackers.job import Job
from perf.benches.attack_list import CALM, STRETCH, Attack, AttackList
from perf.generator.victim import VictimJob
from perf.targets.processes import forget_peak, on_cpu, peak_resident, resident, scheduled
from perf.targets.target import ROOT, SERVER_CPU, TargetFailed

MB = 1 << 20
NAME = "command7"
ATTACKERS_ADDRESS = "127.8."
_START_SECONDS, _END_SECONDS, _SHUTDOWN_SECONDS = 60.0, 60.0, 60.0
_KINDS = ("steady", "connect")
Figures = dict[str, float]


class Child:
    """A process that reads lines, and prints one JSON object a line."""

    def __init__(self, module: str, first: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self.say(first)

    def say(self, line: str) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise TargetFailed("a process of the measurement has ended") from None

    def read(self, seconds: float) -> dict[str, Any]:
        """The next object; empty if none arrives in time.

        Raises:
            TargetFailed: if the process ends first, or reports an error.
        """
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return {}
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "a process of the measurement has ended"}
        if "error" in found:
            raise TargetFailed(found["error"])
        return found

    def end(self) -> dict[str, Any]:
        """Close its input. Returns its last object."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        last: dict[str, Any] = {}
        while not last.keys() & {"done", "result"}:
            last = self.read(_END_SECONDS)
            if not last:
                raise TargetFailed("a process of the measurement does not end")
        self._process.wait(_END_SECONDS)
        return last

    def close(self) -> None:
        """End the process, whatever its state."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


@contextmanager
def child(module: str, first: str) -> Iterator[Child]:
    """A `Child` that ends with the block."""
    made = Child(module, first)
    try:
        yield made
    finally:
        made.close()


@dataclass(frozen=True, slots=True)
class Variant:
    """Transport and encryption."""

    transport: str
    certificate: Certificate | None = None
    """The server's certificate; None for cleartext."""
    authority: Path | None = None
    """The certificate file that clients trust."""

    @property
    def name(self) -> str:
        """The name in the record."""
        return f"{self.transport}, {self.encryption}"

    @property
    def encryption(self) -> str:
        """One of `perf.benches.attack_list.VARIANTS`."""
        return "cleartext" if self.certificate is None else "tls"

    @property
    def settings(self) -> dict[str, str]:
        """The server's settings."""
        found = {"TRANSPORT": self.transport, "WORKERS": "1"}
        if self.certificate is not None:
            found |= {"TLS_CERT_FILE": str(self.certificate.cert), "TLS_KEY_FILE": str(self.certificate.key)}
        return found

    def answer(self, port: int) -> bytes:
        """The serialized answer to the victim's calls."""
        tls = None if self.authority is None else ClientTls(self.authority)
        with Client(port, tls=tls) as client:
            return client.raw("GetCommand", wire.command_request(NAME.encode()))


class Stage:
    """A running server of one variant. The memory and the log of its processes are measured."""

    def __init__(self, server: ServerProcess, table: Table, variant: Variant) -> None:
        self.server, self.table, self.variant = server, table, variant
        self._content = variant.answer(server.port)
        self._worker = server.worker_pids()[0]
        _warm(self._victim_job(), 1.0)

    def _victim_job(self) -> VictimJob:
        return VictimJob(self.server.port, KEY, NAME, self._content.hex(), tls=self.variant.encryption == "tls")

    def play(self, attack: Attack, plan: AttackList, *, short: bool = False) -> tuple[Figures, dict[str, Any]]:
        """Make one attack: measure the victim alone, the victim during the attack, and the memory afterwards. Returns
        figures and details.

        With ``short``, the victim is not measured alone.

        Raises:
            TargetFailed: if the attack yields no figures.
        """
        pids = {"master": self.server.pid, "worker": self._worker}
        before = {name: resident(pid) for name, pid in pids.items()}
        for pid in pids.values():
            forget_peak(pid)
        job = Job(port=self.server.port, key=KEY, name=NAME, tls=self.variant.encryption == "tls", **attack.job)
        with child("perf.generator.victim", self._victim_job().to_json()) as other:
            if not other.read(_START_SECONDS):
                raise TargetFailed("the victim does not start")
            if not short:
                other.say("measure calm")
                time.sleep(plan.calm_seconds)
            line = len(self.server.lines) + len(self.server.other_output)
            with child("perf.attackers.process", job.to_json()) as attackers:
                other.say("measure beginning")
                started = attackers.read(_START_SECONDS)
                other.say("measure beside")
                began = scheduled(self._worker)
                figures = self._act(attack, attackers, attack.duration(plan.seconds, short=short))
                if attack.action != "shutdown":
                    figures[STRETCH] = _stretch(began, scheduled(self._worker))
                details: dict[str, Any] = {"started": bool(started)}
                if attack.action == "shutdown":
                    return figures, details
                peaks = {name: _peak(pid) for name, pid in pids.items()}
                details["victim"] = other.end()["result"]
                details["attackers"] = attackers.end()["done"]
        figures |= _victim_figures(details["victim"])
        figures |= _attackers_figures(details["attackers"])
        self._count_log(line, figures, details)
        if attack.action == "drain":
            return figures, details
        for name in pids:
            if peaks[name] is not None:
                figures[f"{name}_peak_mb"] = round((peaks[name] or 0) - before[name] / MB, 1)
        self._settle(pids, before, plan.settle_seconds, figures)
        return figures, details

    def shut_down(self) -> float:
        """End the server by SIGTERM while no attack is in progress. Returns the seconds that it takes."""
        asked = time.monotonic()
        self.server.signal(signal.SIGTERM)
        self.server.wait_exit(_SHUTDOWN_SECONDS)
        return round(time.monotonic() - asked, 2)

    def _act(self, attack: Attack, attackers: Child, seconds: float) -> Figures:
        """Wait for the attack's duration, and carry out its ``action`` during this time."""
        if attack.action == "publish":
            for _ in range(3):
                time.sleep(seconds / 5)
                self._publish()
            time.sleep(seconds / 5)
        elif attack.action == "drain":
            time.sleep(0.5)  # the attack runs meanwhile
            self.server.signal(signal.SIGTERM)
            time.sleep(3.0)  # the pause is shorter than DRAIN_WAIT_SECONDS
        elif attack.action == "shutdown":
            time.sleep(1.0)  # the same
            return {"shutdown_seconds": self.shut_down()}
        else:
            attackers.read(seconds)  # an attack that has finished before reports that
        return {}

    def _publish(self) -> None:
        generation = self.server.statusz()["catalog"]["generation"]
        self.table.run("UPDATE obex_dapl_functions SET code = code || '#' WHERE name = 'command1'")
        until(lambda: self.server.statusz()["catalog"]["generation"] > generation, self.server.tail, seconds=30)

    def _settle(self, pids: dict[str, int], before: dict[str, int], seconds: float, figures: Figures) -> None:
        """Record the memory once it is near its size before the attack, or when the time is over."""
        figures["workers_died"] = float(self.server.worker_pids() != [pids["worker"]])
        if figures["workers_died"]:
            until(lambda: len(self.server.worker_pids()) == 1, self.server.tail, seconds=30)
            self._worker = self.server.worker_pids()[0]
            return
        began = time.monotonic()
        while True:
            grown = {name: (resident(pid) - before[name]) / MB for name, pid in pids.items()}
            figures |= {f"{name}_after_mb": round(value, 1) for name, value in grown.items()}
            if max(grown.values()) <= _NEAR_MB or time.monotonic() - began > seconds:
                figures["settled_seconds"] = round(time.monotonic() - began, 2)
                return
            time.sleep(0.1)

    def _count_log(self, line: int, figures: Figures, details: dict[str, Any]) -> None:
        written = [*map(json.dumps, self.server.lines), *self.server.other_output][line:]
        figures["log_lines"] = float(len(written))
        figures["peers_named"] = float(sum(ATTACKERS_ADDRESS in each for each in written))
        details["log"] = [each[:400] for each in written[:5]]


_NEAR_MB = 16.0


def _peak(pid: int) -> float | None:
    try:
        return peak_resident(pid) / MB
    except (OSError, StopIteration):
        return None


def _stretch(before: tuple[float, float], after: tuple[float, float]) -> float:
    ran, waited = (now - then for then, now in zip(before, after, strict=True))
    return round(1 + waited / ran, 2) if ran else 1.0


def _victim_figures(result: dict[str, Any]) -> Figures:
    figures: Figures = {}
    for phase, prefix in (("calm", CALM), ("beside", "")):
        for kind in _KINDS:
            found = result.get(phase, {}).get(kind, {})
            figures |= {f"{prefix}{kind}_{name}_ms": found[name] for name in ("p50", "p99", "max") if name in found}
            if found:
                figures[f"{prefix}{kind}_failed"] = float(found["failed"])
    return figures


def _attackers_figures(done: dict[str, int]) -> Figures:
    figures = {name.replace(" ", "_"): float(count) for name, count in done.items()}
    figures.setdefault("goaway", 0.0)
    if opened := done.get("opened"):
        figures["ended_in_time_share"] = round(done.get("ended in time", 0) / opened, 3)
    return figures


def _warm(job: VictimJob, seconds: float) -> None:
    """Make calls for a while, so that the first attack does not measure the server's first calls."""
    with child("perf.generator.victim", job.to_json()) as victim:
        victim.read(_START_SECONDS)
        victim.say("measure warm")
        time.sleep(seconds)
        victim.end()


@contextmanager
def stage(table: Table, variant: Variant, settings: dict[str, str]) -> Iterator[Stage]:
    """A server with one worker on its own CPU; the log level is that of production."""
    server = ServerProcess(table.url, **variant.settings, **settings)
    server.command = on_cpu(SERVER_CPU, server.command)
    with server:
        server.wait_ready()
        yield Stage(server, table, variant)
