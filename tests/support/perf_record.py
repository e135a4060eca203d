"""A plausible record of `python -m perf`, with every part and with realistic figures and noise."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

from tests.support.hdr import HdrHistogram

ROUNDS = 6
FALLEN = "grpcio-sync"
"""The server that fails in `get-missing`."""
WHY_FALLEN = "it answered <b>INTERNAL</b> instead of NOT_FOUND | 12 times"
# Calls per second of CPU time by scenario, as a share of those for one definition.
_SCENARIOS: Mapping[str, tuple[str, float]] = {
    "get-hot": ("closed", 1.0), "rated": ("open", 0.28), "get-zipf": ("closed", 0.55), "get-missing": ("closed", 0.32),
    "upstream-stress": ("closed", 0.16), "saturate": ("open", 0.5),
}  # fmt: skip
_TITLES = {
    "get-hot": "one definition", "rated": "8,750 calls a second on one core", "get-missing": "unknown names",
    "get-zipf": "100,000 definitions, few of them often", "saturate": "up to the limit and beyond",
}  # fmt: skip
_RATES = {
    "native": 548_000, "compiled": 702_000, "grpcio": 9_700, "grpc-js": 23_800, "grpc-go": 41_000,
    "tonic": 118_000, "grpcio-aio": 8_100, "grpcio-sync": 6_900, "nghttpd": 589_000, "nginx": 211_000,
}  # fmt: skip


def sample(*, seed: int = 1, measured: str = "2026-11-25T10:20:30+00:00", faster: float = 1.0) -> dict[str, Any]:
    """A new record; ``faster`` multiplies the rates of the servers. The caller may change it."""
    made: dict[str, Any] = json.loads(_encoded(seed, measured, faster))
    return made


@cache
def _encoded(seed: int, measured: str, faster: float) -> str:
    """The record as JSON, because reading it is a hundred times faster than making it."""
    return json.dumps(_made(random.Random(seed), measured, faster))


def _made(noise: random.Random, measured: str, faster: float) -> dict[str, Any]:
    runs = [
        _run(noise, scenario, server, number, faster)
        for scenario in _SCENARIOS for number in range(ROUNDS) for server in _RATES
        if scenario != "saturate" and (server not in ("nghttpd", "nginx") or scenario == "get-hot")
    ]  # fmt: skip
    knee = [_knee(noise, step) for step in range(12)]
    knee.append(
        knee[-1] | {"offered_rate": 500_000.0, "valid": False, "reason": "the generator could not keep the rate"}
    )
    runs += [
        _run(noise, "saturate", "native", step, faster) | {"offered_rate": point["offered_rate"], "rate": point["rate"]}
        for step, point in enumerate(knee)
    ]
    return {
        "schema": 1, "title": "Definition server, performance", "measured": measured, "duration_seconds": 312.4,
        "arguments": {"full": True}, "commit": "0126c00aa17b+",
        "machine": {
            "cpu": "AMD EPYC (family 25, model 1)", "cpus": 2, "kernel": "6.1.0-28-amd64", "python": "3.11.2",
            "governor": "not told", "memory_mb": 7936, "load_before": [0.17, 0.29, 0.17],
            "load_after": [1.92, 1.4, 0.8], "steal_ticks_before": 812, "steal_ticks_after": 830,
        },
        "versions": {"grpcio": "1.85.1", "uvloop": "0.22.1", "node": "v22.11.0", "go": "not installed"},
        "scenarios": {name: {"title": title, "why": "it is asked"} for name, title in _TITLES.items()},
        "runs": runs, "knee": knee, "gates": _gates(noise), "memory": _memory(),
        "selftest": {
            "runs": 20,
            "cases": [
                {"name": "clean", "what": "the worker as it is", "alarm_expected": False, "limit": 1,
                 "alarms": [number == 13 for number in range(20)]},
                {"name": "slowed", "what": "10 % busy work in the hot path", "alarm_expected": True, "limit": 19,
                 "alarms": [True] * 20},
                {"name": "delayed", "what": "3 ms in 1 of 100 calls", "alarm_expected": True, "limit": 19,
                 "alarms": [number not in (4, 9) for number in range(20)]},
            ],
        },
        "skipped": [{"what": "grpc-java", "why": "mvn is not installed"}],
        "witnesses": [
            {"witness": "h2load", "what": "throughput, 8 × 32", "unit": "calls/s", "ours": 541_000.0,
             "theirs": 552_000.0, "allowed": 0.15, "reason": "", "difference": -0.0199, "verdict": "agrees"},
            {"witness": "ghz", "what": "P95 at 2,000 a second", "unit": "ms", "ours": 0.31, "theirs": 0.52,
             "allowed": 0.2, "reason": "ghz is at its own limit", "difference": -0.404, "verdict": "explained"},
            {"witness": "ghz", "what": "P95 at 500 a second", "unit": "ms", "ours": 0.2, "theirs": 0.4,
             "allowed": 0.2, "reason": "", "difference": -0.5, "verdict": "disagrees"},
        ],
    }  # fmt: skip


def write(folder: Path, record: dict[str, Any] | None = None, name: str = "2026-11-25-epyc-2cpu.json") -> Path:
    """Write ``record`` (or a sample) into ``folder``. Returns its path."""
    path = folder / name
    path.write_text(json.dumps(sample() if record is None else record), encoding="utf-8")
    return path


def histogram(median_ms: float, spread: float, count: int = 40_000) -> str:
    """Latencies in nanoseconds, encoded as HdrHistogram V2. They are log-normal, and one of 250 is six times as slow.
    ``count`` is a multiple of the number of places that are taken, 400 or less."""
    made, places = HdrHistogram(1, 60 * 10**9, 3), min(400, count)
    for place in range(places):
        value = median_ms * 1e6 * math.exp(spread * NormalDist().inv_cdf((place + 0.5) / places))
        slow = count // places // 250
        made.record_value(int(value), count // places - slow)
        if slow:
            made.record_value(int(value * 6), slow)
    encoded = made.encode()
    return encoded.decode() if isinstance(encoded, bytes) else str(encoded)


def _run(noise: random.Random, scenario: str, server: str, number: int, faster: float) -> dict[str, Any]:
    kind, share = _SCENARIOS[scenario]
    head = {"scenario": scenario, "server": server, "kind": kind, "round": number}
    if server == FALLEN and scenario == "get-missing":
        return head | {"valid": False, "reason": WHY_FALLEN, "fault": "server"}
    if server == "native" and scenario == "get-zipf" and number == 2:
        return head | {"valid": False, "reason": "the generator was late: 3.1 % of calls", "fault": "generator"}
    # A harder scenario affects a slower server less, because a slower server spends most of its time on other work.
    per_core = faster * _RATES[server] * share ** (0.4 + 0.6 * math.log(_RATES[server]) / math.log(600_000))
    per_core *= noise.gauss(1, 0.012)
    offered = 8750.0 if scenario == "rated" else None
    seconds = 2.0
    rate = min(offered, per_core) if offered else per_core * 0.98
    cpu = rate * seconds / per_core
    median_ms = 2.2e3 / _RATES[server] ** 0.8 if offered else 256e3 / per_core
    tail = {"p50": 1.0, "p90": 1.43, "p95": 1.59, "p99": 1.97, "p999": 7.6, "max": 13.0}
    return head | {
        "valid": True, "reason": "", "fault": "", "offered_rate": offered, "answered": int(rate * seconds),
        "seconds": seconds, "rate": rate, "per_server_cpu_second": per_core, "server_cpu_seconds": cpu,
        "server_user_seconds": cpu * 0.62, "server_system_seconds": cpu * 0.38,
        "server_softirq_seconds": cpu * 0.09 if server not in ("nghttpd", "nginx") else None,
        "client_cpu_seconds": rate * seconds * 1.4e-6, "client_us_per_call": noise.gauss(1.4, 0.05),
        "latency": {name: median_ms * factor for name, factor in tail.items()}, "histogram_unit": "ns",
        "histogram": histogram(median_ms * noise.gauss(1, 0.02), 0.28),
        "resident_mb": 48.0, "peak_resident_mb": 52.0, "late": 0.001,
    }  # fmt: skip


def _knee(noise: random.Random, step: int) -> dict[str, Any]:
    offered, most = 60_000 * 1.2**step, 310_000.0
    load = min(offered / most, 0.995)
    median_ms = 0.12 / (1 - load) ** 0.6 * noise.gauss(1, 0.04) * (1 if offered < most else 4)
    return {"server": "native", "offered_rate": offered, "rate": min(offered, most), "valid": True, "reason": "",
            "p50": median_ms, "p95": median_ms * 1.7, "p99": median_ms * 2.9}  # fmt: skip


def _gates(noise: random.Random) -> list[dict[str, Any]]:
    def gate(name: str, value: float, limit: float, bound: str, unit: str, **more: Any) -> dict[str, Any]:
        samples = sorted(value * noise.gauss(1, 0.02) for _ in range(7))
        return {"gate": name, "scenario": "rated" if unit == "ms" else "get-hot", "server": "native",
                "value": samples[3], "low": samples[0], "high": samples[-1], "limit": limit, "bound": bound,
                "unit": unit, "noise_model": "Median of interleaved rounds.", "verdict": "kept", "reason": "",
                "samples": samples} | more  # fmt: skip

    return [
        gate("calls per core, one definition", 548_000, 200_000, "least", "calls/s"),
        gate("native ÷ grpcio, one definition", 56.4, 40, "least", "×"),
        gate("P95 at 8,750 calls a second on one core", 0.11, 1.0, "most", "ms"),
        gate("calls per core over TLS", 57_800, 60_000, "least", "calls/s", verdict="missed",
             reason="the median and its whole interval lie beyond the limit"),
        {"gate": "calls per core, wrong keys", "scenario": "auth-flood", "value": None, "low": None, "high": None,
         "limit": 100_000, "bound": "least", "unit": "calls/s", "noise_model": "", "verdict": "invalid",
         "reason": "native was not measured in auth-flood", "samples": []},
    ]  # fmt: skip


def _memory() -> list[dict[str, Any]]:
    return [
        {"definitions": count, "workers": workers, "shared_mb": count * 2080 / 2**20 + 0.3,
         "private_mb_per_worker": 26.0, "master_mb": 61 + count * 0.00021,
         "peak_mb": (count * 2080 / 2**20) * 2.1 + 61 + 26 * workers}
        for count in (1000, 10_000, 100_000) for workers in (1, 2, 4)
    ]  # fmt: skip
