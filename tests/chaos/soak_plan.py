"""The faults of a soak, their order and their length: a seed determines all of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from tests.chaos import faults_client, faults_machine, faults_process
from tests.chaos.drills.catalogue import every_fault
from tests.chaos.drills.model import Fault
from tests.chaos.machine import Unavailable

PAUSE_SECONDS = (0.5, 3.0)
HOLD_SECONDS = (0.5, 4.0)

_WHOLE_SERVER = "the whole server is down, and a single server cannot answer then"
_LARGE = "needs a table of another size"
_ENVIRONMENT = "needs a server started for it"
_GENTLE = "is included in full strength"

LEFT_OUT = {
    "db-standby-behind": "goes back to an older version, as intended",
    "db-truncated-mid-read": _LARGE,
    "db-read-cancelled": _LARGE,
    "db-network-disconnected": "needs a container",
    "worker-oom-killed": "needs a worker that touches new pages; after a crowd it has free ones",
    "bad-build": _ENVIRONMENT,
    "clock-forward": _ENVIRONMENT,
    "clock-back": _ENVIRONMENT,
    "server-restarted": _WHOLE_SERVER,
    "server-killed": _WHOLE_SERVER,
    "master-killed": _WHOLE_SERVER,
    "snapshot-damaged": _WHOLE_SERVER,
    "port-taken": _WHOLE_SERVER,
    **{fault.id: _GENTLE for fault in faults_client.GENTLE_FAULTS},
}
"""Faults that no soak includes, and the reasons."""

LEFT_OUT_ON_GRPCIO = {
    "client-attacks": "costs calls on grpcio",
    "workers-all-killed": _WHOLE_SERVER,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One fault."""

    fault: str
    pause_seconds: float
    """Seconds of pause before the fault."""
    hold_seconds: float
    """How long the fault lasts after its first effect."""


def plan(seed: int, faults: Sequence[str]) -> Iterator[Step]:
    """Endless steps: round by round, each fault once per round, in a random order for each round."""
    chance = random.Random(seed)
    for _ in count():
        for fault in chance.sample(sorted(faults), len(faults)):
            yield Step(fault, round(chance.uniform(*PAUSE_SECONDS), 2), round(chance.uniform(*HOLD_SECONDS), 2))


def unavailable(transport: str) -> dict[str, str]:
    """Faults that a soak on ``transport`` leaves out on this machine: id → reason."""
    found = LEFT_OUT | (LEFT_OUT_ON_GRPCIO if transport == "grpcio" else {})
    for name, need in (faults_process.NEEDS | faults_machine.NEEDS).items():
        if name not in found:
            try:
                need()
            except Unavailable as error:
                found[name] = str(error)
    return found


def eligible(transport: str) -> dict[str, Fault]:
    """The faults to choose from, with the strength and allowance for ``transport``."""
    without = unavailable(transport)
    found = {}
    for name, fault in every_fault().items():
        if name not in without:
            for module in (faults_client, faults_process, faults_machine):
                if fault in module.FAULTS:
                    fault = module.on_transport(fault, transport)
            found[name] = fault
    return found
