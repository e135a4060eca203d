"""A worker whose event loop hangs must not hold the port for ever after its master has ended."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from definition_server.data_plane.worker import EXIT_ORPHANED

HANGING = """
import sys, time
from definition_server.data_plane.worker import _leave_at_the_latest
_leave_at_the_latest(int(sys.argv[1]), 0.2)
print("hangs", flush=True)
time.sleep(120)
"""


def test_a_hung_worker_ends_some_time_after_its_master() -> None:
    master, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with subprocess.Popen(
        [sys.executable, "-c", HANGING, str(worker.fileno())],
        pass_fds=[worker.fileno()],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        worker.close()
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        assert process.poll() is None, "the worker stays while the master lives"
        closed = time.monotonic()
        master.close()
        assert process.wait(30) == EXIT_ORPHANED
        assert time.monotonic() - closed >= 0.2
