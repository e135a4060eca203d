"""A worker's memory returns to the kernel when large blocks are freed, whatever lies behind them."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from definition_server.data_plane.allocator import return_large_blocks

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 1_000_000

if sys.argv[1] == "set" and not return_large_blocks():
    print(-1)
else:
    large = bytes(8_000_000)  # once it is freed, glibc keeps blocks up to this size in its heap
    del large
    before = resident()
    held = [(b"x" * (65_000 + number), b"y" * (2_000 + number)) for number in range(1000)]
    for number in range(1000):
        held[number] = held[number][1]
    print(resident() - before)
"""


def grown(mode: str) -> int:
    """MB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    found = int(done.stdout)
    if found < 0:
        pytest.skip("the C library has no mallopt")
    return found


def test_freed_blocks_of_input_are_not_resident_any_more() -> None:
    assert grown("set") < 33
    assert grown("not set") > 50, "otherwise the setting is superfluous"
