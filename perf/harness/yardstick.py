"""Runs by h2load, for servers that do not implement the contract and servers compared with them.

h2load reports the HTTP statuses and the number of octets of all bodies; both are checked here. It does not check the
content of bodies. That is enough to compare costs; all other runs are made by our own generator.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.support import wire

from perf.generator.scenarios import YARDSTICKS, Scenario
from perf.targets.catalogue import name_of
from perf.targets.target import Target, h2load

_FIRST = 20
"""Calls on each stream in the first, shortest run, which warms the server up."""
_PROBE_SECONDS = 0.15
_MESSAGE_HEAD = 5
"""Octets before a gRPC message: compressed flag and length."""


def by_h2load(target: Target, scenario: Scenario) -> dict[str, Any]:
    """One closed loop of about ``scenario.seconds``; shorter ones before it determine the number of calls.

    Raises:
        TargetFailed: if h2load is missing, or an answer is missing or wrong.
    """
    connections, streams = scenario.connections, scenario.streams
    octets = scenario.answer_octets + _MESSAGE_HEAD
    with tempfile.TemporaryDirectory(prefix="definition-server-perf-") as folder:
        request = Path(folder) / "request"
        request.write_bytes(wire.message(wire.command_request(name_of(0).encode())))
        grpc = target.name not in YARDSTICKS
        path = wire.GET_COMMAND.decode() if grpc else "/answer"
        run: dict[str, Any] = {"rate": 0.0}
        for seconds in (0.0, _PROBE_SECONDS, scenario.seconds):
            count = max(_FIRST * connections * streams if not seconds else 100, int(run["rate"] * seconds))
            run = h2load(target, path, count, connections, streams, octets=octets, request=request if grpc else None)
    return run | {"valid": True, "reason": "", "generator": "h2load", "offered_rate": None}
