"""Runs Chromium without access to other machines, and returns its rendering of a page."""

from __future__ import annotations

import os
import signal
import subprocess
import zlib
from pathlib import Path

from tests.judges.tools import command

SECONDS = 90


def chromium(tmp_path: Path, *options: str) -> str:
    """Run the browser. Returns its output."""
    arguments = [
        command("chromium", "Debian chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=20000", *options,
    ]  # fmt: skip
    # The browser has its own process group, so that none of its processes is left if it hangs.
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, errors
    return out


def inked(picture: Path) -> int:
    """A measure of how much the picture shows. PNG stores the differences between neighbouring pixels, so drawings need
    many different values."""
    octets, place, packed = picture.read_bytes(), 8, b""
    while place < len(octets):
        length = int.from_bytes(octets[place : place + 4])
        if octets[place + 4 : place + 8] == b"IDAT":
            packed += octets[place + 8 : place + 8 + length]
        place += 12 + length
    return len(set(zlib.decompress(packed))) * len(packed)
