"""Orphans that the first process of a container inherits are reaped; asyncio still reaps the master's own children."""

from __future__ import annotations

import subprocess
import sys

# This program declares its process the reaper of orphaned descendants, as PID 1 always is.
PROGRAM = """
import asyncio, ctypes, os, sys
from pathlib import Path
from definition_server.control_plane.orphans import reap_orphans

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0

def children():
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}

async def main(reaping):
    if reaping:
        task = asyncio.create_task(reap_orphans(0.05))
    # Each shell leaves a process behind, which ends at once or a moment later.
    for command in ("exit 0 & exit 0", "sleep 0.1 & sleep 0.2 & exit 0"):
        await (await asyncio.create_subprocess_exec("sh", "-c", command)).wait()
    own = await asyncio.create_subprocess_exec("sh", "-c", "sleep 0.5; exit 7")
    late = await asyncio.create_subprocess_exec("sh", "-c", "exit 8")
    codes = [await own.wait(), await late.wait()]
    for _ in range(100 if reaping else 10):
        if not children():
            break
        await asyncio.sleep(0.05)
    print(codes, len(children()), flush=True)
    if reaping:
        assert not task.done()

asyncio.run(main(sys.argv[1] == "reaping"))
"""


def run(mode: str) -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_orphans_are_reaped_and_own_children_keep_their_exit_codes() -> None:
    assert run("reaping") == "[7, 8] 0"


def test_without_reaping_orphans_stay() -> None:
    """If orphans were reaped here, too, the test above would prove nothing."""
    codes, left = run("idle").rsplit(" ", 1)
    assert codes == "[7, 8]"
    assert int(left) == 3
