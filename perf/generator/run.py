"""The load generator: `run` makes the calls of one scenario against one server and returns the figures.

Separate processes (`perf.generator.process`) make the calls. They are kept off the server's CPU and begin at the same
instant; the first of them also reads the server's CPU time when its measurement begins and ends. Their histograms are
added up. A run is not valid if the server answers wrongly, does not answer or dies, or if the generator could not keep
its schedule: it then has ``"valid": False``, the reason in words, and the side whose fault it was.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from time import monotonic, sleep
from typing import Any

from perf.generator import histogram
from perf.generator.job import Job
from perf.generator.scenarios import Scenario
from perf.targets.catalogue import Catalogue
from perf.targets.processes import is_alive, on_cpu
from perf.targets.target import CLIENT_CPU, KEY, ROOT, Target

LATE_SHARE = 0.01
"""The allowed share of calls that are sent late. Beyond it, the generator did not offer the required load."""
GROWN_SHARE = 0.01
"""Allowed growth of the number of unanswered calls, as a share of the calls, while the server is not busy."""
BUSY = 0.9
"""Share of a CPU: a process that uses more is at its limit."""
DEADLINES = 100_000
"""Number of different deadlines: more than any memo can hold."""
SLOW_READERS = 16
_FEW = 20
"""The number of unanswered calls that is normal at any instant."""
_READY_SECONDS = 60.0
_START_SECONDS = 0.02
_DYING_SECONDS = 0.5
_LOOPS = {
    "closed": "closed", "idle": "closed", "open": "open", "publish": "open", "slow-reader": "open", "sync": "sync",
}  # fmt: skip
_OWN = {each.name for each in fields(Job)} - {each.name for each in fields(Scenario)}
"""Fields of a job that scenarios do not have; they can be overridden too."""

Run = dict[str, Any]


class Spoilt(Exception):
    """The run has no figures; ``fault`` names the cause: ``server``, ``generator`` or ``machine``."""

    def __init__(self, reason: str, fault: str) -> None:
        super().__init__(reason)
        self.fault = fault


def run(
    target: Target,
    scenario: Scenario,
    catalogue: Catalogue,
    *,
    processes: int = 0,
    measuring: Callable[[], None] | None = None,
    **overrides: Any,
) -> Run:
    """Measure ``target``, which serves ``catalogue``. Any thread may call it.

    Args:
        processes: Number of processes of the generator; 0: one for each CPU other than the server's, at most 4.
        measuring: Called in this thread when the warm-up is over.
        overrides: Other values for fields of ``scenario`` (``rate`` in calls per second) and of `Job` (``warmup``,
            ``patience``, ``spread``, ``attack``, …).

    Returns:
        A run: ``valid``, ``reason`` and ``fault``; ``answered`` calls in ``seconds``, ``rate`` (1/s), ``offered_rate``,
        ``late`` (share of calls sent more than 1 ms late), ``latency`` (ms) and ``histogram`` (``histogram_unit``);
        the server's CPU time in seconds, split into user, system and softirq (the time that its CPU spent in soft
        interrupts, which system does not include); ``per_server_cpu_second``, ``client_us_per_call``, ``limited_by``;
        memory in MB. A run that is not valid may lack figures; the figures that it has only help to find the cause.

    Raises:
        TypeError: for an override that is not a field.
        ValueError: for a scenario whose kind or rate cannot be generated.
    """
    mine = {name: overrides.pop(name) for name in tuple(overrides) if name in _OWN}
    scenario = replace(scenario, **overrides)
    if scenario.kind not in _LOOPS or isinstance(scenario.rate, str):
        raise ValueError(f"{scenario.name}: kind {scenario.kind}, rate {scenario.rate} cannot be generated")
    offered = float(scenario.rate) if _LOOPS[scenario.kind] == "open" else None
    head = {"scenario": scenario.name, "server": target.name, "kind": scenario.kind, "offered_rate": offered}
    made: Run = {"late": None}
    try:
        cpus = _client_cpus(target)
        count = min(processes or min(4, len(cpus)), scenario.connections)
        jobs = _jobs(target, scenario, catalogue, count, mine)
        results = _measured(jobs, cpus, catalogue.descriptor, measuring, target)
        made = _summed(results, jobs, target)
        judge(made, jobs, results)
    except Spoilt as spoilt:
        return head | made | {"valid": False, "reason": str(spoilt), "fault": spoilt.fault}
    return head | made


def _client_cpus(target: Target) -> list[int]:
    """The CPUs on which the generator may run: those that the server does not use."""
    if (os.cpu_count() or 1) < 2:
        raise Spoilt("this machine has one CPU: server and generator would share it, at least 2 are needed", "machine")
    try:
        server = os.sched_getaffinity(target.pid)
    except ProcessLookupError:
        raise Spoilt(f"{target.name} is not running (process {target.pid} has ended)", "server") from None
    # The CPU mask of the calling thread is not enough, because the caller may be bound to one CPU.
    free = sorted(set(range(os.cpu_count() or 1)) - server)
    if not free:
        free = [CLIENT_CPU]
    if set(free) & server and len(server) < 2:
        raise Spoilt(f"{target.name} runs on CPU {free[0]}, which the generator needs", "machine")
    return [CLIENT_CPU, *(cpu for cpu in free if cpu != CLIENT_CPU)] if CLIENT_CPU in free else free


def _jobs(target: Target, scenario: Scenario, catalogue: Catalogue, count: int, mine: Mapping[str, Any]) -> list[Job]:
    """One job for each process; connections and rate are divided among them."""
    try:
        pids = target.pids
        server_cpus = sorted(os.sched_getaffinity(target.pid))
    except OSError:
        raise Spoilt(f"{target.name} is not running (process {target.pid} has ended)", "server") from None
    first = Job(
        kind=_LOOPS[scenario.kind], port=target.port, pids=pids, server_cpus=server_cpus,
        snapshot=catalogue.descriptor, key=KEY, names=scenario.names, unknown=scenario.unknown,
        bad_key=scenario.bad_key, tls=scenario.tls, streams=scenario.streams, rate=float(scenario.rate) / count,
        deadlines=DEADLINES if scenario.deadlines is True else int(scenario.deadlines), seconds=scenario.seconds,
    )  # fmt: skip
    first = replace(first, **mine)
    jobs = [replace(first, member=number, connections=_share(scenario.connections, count, number))
            for number in range(count)]  # fmt: skip
    slow = mine.get("slow", SLOW_READERS if scenario.kind == "slow-reader" else 0)
    jobs[0] = replace(jobs[0], idle=scenario.idle, slow=slow)
    return [jobs[0], *(replace(job, attack="") for job in jobs[1:])]


def _share(whole: int, count: int, number: int) -> int:
    return whole // count + (number < whole % count)


# -- the processes -----------------------------------------------------------------------------------------------------


def _measured(
    jobs: Sequence[Job], cpus: Sequence[int], descriptor: int, measuring: Callable[[], None] | None, target: Target
) -> list[dict[str, Any]]:
    """The result of each process. All of them have ended when this returns."""
    with ExitStack() as stack:
        members = [Member(job, cpus[number % len(cpus)], descriptor) for number, job in enumerate(jobs)]
        for member in members:
            stack.callback(member.end)
        try:
            for member, job in zip(members, jobs, strict=True):
                member.send(asdict(job))
            for member in members:
                member.expect("ready", _READY_SECONDS)
            start = monotonic() + _START_SECONDS
            for member in members:
                member.send({"start": start})
            longest = jobs[0].warmup + jobs[0].seconds + 2 * jobs[0].patience + _READY_SECONDS
            members[0].expect("measuring", longest)
            if measuring is not None:
                measuring()
            return [member.expect("result", longest) for member in members]
        except Spoilt as spoilt:
            if spoilt.fault == "server" and _has_died(target.pid):
                raise Spoilt(f"{target.name} died: {spoilt}", "server") from None
            where = f"{target.name}: " if spoilt.fault == "server" else ""
            raise Spoilt(f"{where}{spoilt}", spoilt.fault) from None


def _has_died(pid: int) -> bool:
    """Whether the process has ended or is ending: its connections close shortly before it ends."""
    deadline = monotonic() + _DYING_SECONDS
    while is_alive(pid):
        if monotonic() > deadline:
            return False
        sleep(0.005)
    return True


class Member:
    """One process of the generator. The caller must call `end`."""

    def __init__(self, job: Job, cpu: int, descriptor: int) -> None:
        self._process = subprocess.Popen(
            on_cpu(cpu, [sys.executable, "-m", "perf.generator.process"]),
            cwd=ROOT,
            pass_fds=[descriptor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._rest = b""

    def send(self, what: Mapping[str, Any]) -> None:
        """Send one line of JSON."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(json.dumps(what).encode() + b"\n")
                self._process.stdin.flush()
        except BrokenPipeError:
            return  # the process has ended; `expect` raises the reason

    def expect(self, key: str, seconds: float) -> Any:
        """The value that the process sends under ``key``; other messages are skipped.

        Raises:
            Spoilt: if the process reports an error, ends, or sends no line in time.
        """
        deadline = monotonic() + seconds
        while True:
            message = json.loads(self._line(deadline, key))
            if key in message:
                return message[key]
            if "error" in message:
                raise Spoilt(message["error"], message["fault"])

    def _line(self, deadline: float, key: str) -> bytes:
        """The next line of its standard output."""
        if self._process.stdout is None:
            raise Spoilt("the generator has no output", "generator")
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - monotonic())):
                    raise Spoilt(f"the generator did not send {key} in time", "generator")
                data = os.read(descriptor, 1 << 16)
                if not data:
                    raise Spoilt(f"the generator ended without a result: {self._last_words()}", "generator")
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        self._process.wait(10)
        errors = self._process.stderr.read().decode(errors="replace") if self._process.stderr is not None else ""
        return " ".join(errors.split())[-600:] or f"exit code {self._process.returncode}"

    def end(self) -> None:
        """Kill the process unless it has ended."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        self._process.wait()


# -- figures and judgement ---------------------------------------------------------------------------------------------


def _summed(results: Sequence[Mapping[str, Any]], jobs: Sequence[Job], target: Target) -> Run:
    """The figures of all processes together."""
    first = results[0]
    answered, seconds = sum(each["answered"] for each in results), first["seconds"]
    server, client = first["server_cpu_seconds"], sum(each["client_cpu_seconds"] for each in results)
    # Ticks are coarse and the CPU-time clock is precise: the ticks only give the ratio in which to split its time.
    user, softirq = min(server, first["server_user_seconds"]), first["server_softirq_seconds"]
    softirq = min(softirq, server - user)
    whole = histogram.merged([each["histogram"] for each in results])
    made: Run = {
        "valid": True, "reason": "", "fault": "",
        "answered": round(answered), "seconds": seconds, "rate": answered / seconds,
        "server_cpu_seconds": server, "server_user_seconds": user, "server_softirq_seconds": softirq,
        "server_system_seconds": server - user - softirq,
        "per_server_cpu_second": answered / server if server else 0.0,
        "client_cpu_seconds": client, "client_us_per_call": client / answered * 1e6 if answered else 0.0,
        "latency": histogram.latency(whole), "histogram": histogram.encode(whole), "histogram_unit": histogram.UNIT,
        "resident_mb": first["resident_mb"], "peak_resident_mb": first["peak_resident_mb"], "late": None,
        "taken_apart": sum(each["taken_apart"] for each in results), "processes": len(results),
        "limited_by": _limit(server / seconds, client / seconds / len(results)),
    }  # fmt: skip
    if jobs[0].kind == "open":
        due = sum(each["due"] for each in results)
        made["late"] = sum(each["late"] for each in results) / due if due else 0.0
        made["offered_rate"] = sum(each["offered_rate"] for each in results)
    if "octets" in first:
        made["octets_per_server_cpu_second"] = sum(each["octets"] for each in results) / (server or 1e9)
    return made | {name: first[name] for name in ("idle", "slow_readers", "attack") if name in first}


def _limit(server: float, client: float) -> str:
    """The side that was at its limit. ``server`` and ``client`` are the shares of a CPU that they used."""
    return "server" if server >= BUSY else "generator" if client >= BUSY else "neither"


def judge(made: Run, jobs: Sequence[Job], results: Sequence[Mapping[str, Any]]) -> None:
    """Check that the figures describe the server.

    Raises:
        Spoilt: if the figures do not describe the server.
    """
    if jobs[0].kind == "open":
        _judge_schedule(made, results)
    if not made["answered"]:
        raise Spoilt("no call was answered during the measurement", "server")
    idle = made.get("idle")
    if idle and idle["alive"] < idle["held"]:
        raise Spoilt(f"of {idle['held']} idle connections the server closed {idle['held'] - idle['alive']}", "server")


def _judge_schedule(made: Run, results: Sequence[Mapping[str, Any]]) -> None:
    """Check that calls were sent when they were due, and that only the server delayed their answers."""
    due, grown = sum(each["due"] for each in results), sum(each["grown"] for each in results)
    if not due:
        # The generator was so late that one iteration, which sends all overdue calls, outlasted the measurement.
        raise Spoilt("the generator was too late to measure: no call was due during the measurement", "generator")
    seconds = made["seconds"] * len(results)
    busy, spinning = made["client_cpu_seconds"] / seconds, sum(each["spinning_seconds"] for each in results) / seconds
    fault = "generator" if busy >= BUSY else "machine"
    why = f"it was busy for {busy:.0%} of its CPU's time"
    if fault == "generator":
        why += ": too slow for this rate"
    elif busy + spinning < BUSY:
        why += f", and other processes had that CPU for {1 - busy - spinning:.0%}"
    if made["late"] > LATE_SHARE:
        late = f"{made['late']:.1%} of the calls were sent more than 1 ms late (at most {LATE_SHARE:.0%} may be)"
        raise Spoilt(f"the generator was late: {late}; {why}", fault)
    if grown > GROWN_SHARE * due + _FEW and made["server_cpu_seconds"] / made["seconds"] < BUSY:
        achieved = f"{made['rate']:,.0f} of {made['offered_rate']:,.0f} calls a second were answered"
        raise Spoilt(f"{achieved} while the server was not at its limit; the generator: {why}", fault)
