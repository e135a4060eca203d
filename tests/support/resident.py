"""The resident octets of mappings, by proc_pid_smaps(5)."""

from __future__ import annotations

import re
from pathlib import Path


def resident_octets(memfd: str) -> int:
    """Octets that this process has resident of all its mappings of memfds with this name."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    found = [block for block in blocks if f"/memfd:{memfd} " in block.partition("\n")[0]]
    return sum(1024 * int(kb) for block in found for kb in re.findall(r"^Rss: +(\d+) kB$", block, flags=re.MULTILINE))
