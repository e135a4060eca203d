"""The state after the warm-up: all objects are frozen, and the collector's threshold fits the transport."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own: the collector is the whole process's.
PROGRAM = """
import asyncio, gc, json, sys
from definition_server.data_plane.warmup import WarmUp
from definition_server.ipc.messages import Configure
before = gc.get_threshold()[0]
asyncio.run(WarmUp(Configure("127.0.0.1", 0, sys.argv[1], False, 0.0, 4, "production", "INFO", 5.0)).run())
print(json.dumps([gc.get_freeze_count(), before, gc.get_threshold()[0], gc.isenabled()]))
"""


@pytest.mark.parametrize(("name", "young"), [("native", 5000), ("grpcio", None)], ids=["native", "grpcio"])
def test_warm_up_freezes_existing_objects_and_raises_the_gc_threshold(name: str, young: int | None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    frozen, before, threshold, enabled = json.loads(done.stdout.splitlines()[-1])
    assert frozen > 10_000
    assert threshold == (young or before), "None: as the interpreter has it, 700 objects, from 3.14 on 2,000"
    assert enabled, "connections that come and go make cycles"
