"""Clients in addition to a load: idle connections, and clients that read slowly."""

from __future__ import annotations

import os
import socket
import ssl
from time import monotonic
from typing import Any

from tests.support import wire

from perf.generator.answers import WrongAnswer
from perf.generator.connection import connect
from perf.generator.job import Job
from perf.targets.processes import resident

_IDLE_PER_ADDRESS = 5000
"""Connections from one source address; the kernel's range has 28,000 ports (ip_local_port_range)."""
_SLOW_ASKED = 2
"""Catalogues that a slow reader requests."""
_SLOW_OCTETS, _SLOW_SECONDS = 4096, 0.05
"""Octets of one read, and seconds between two reads: 80 kB/s."""
_SLOW_BUFFER = 4096
"""Octets of a slow reader's receive buffer; octets that do not fit into it stay in the server."""


class IdleConnections:
    """Connections of clients that make no call. Their windows are open, and SETTINGS are exchanged."""

    def __init__(self, job: Job) -> None:
        before = _resident(job.pids)
        # Ports of closed connections stay in use for a minute (TIME_WAIT), so every process has its own addresses.
        network = f"127.{1 + os.getpid() % 250}"
        self._held: list[socket.socket] = []
        try:
            for number in range(job.idle):
                source = f"{network}.{number // _IDLE_PER_ADDRESS}.1"
                sock = connect(job.port, source=source, seconds=job.patience, tls=job.tls)
                self._held.append(sock)
                sock.sendall(wire.opening())
            for sock in self._held:
                _exchange(sock)
        except BaseException:
            self._close()
            raise
        self.resident_kb_each = (_resident(job.pids) - before) / 1000 / max(1, job.idle)

    def step(self) -> None:
        """Idle connections need no work."""

    def close(self) -> dict[str, Any]:
        """Close the connections. Returns the number of connections that were held, the number that the server had not
        closed, and the server's memory for each."""
        alive = 0
        for sock in self._held:
            sock.setblocking(False)
            try:
                alive += sock.recv(4096) != b""
            except (BlockingIOError, ssl.SSLWantReadError):
                alive += 1
            except OSError:
                continue
        held = len(self._held)
        self._close()
        return {"held": held, "alive": alive, "resident_kb_each": round(self.resident_kb_each, 3)}

    def _close(self) -> None:
        for sock in self._held:
            sock.close()


def _resident(pids: list[int]) -> int:
    return sum(resident(pid) for pid in pids)


def _exchange(sock: socket.socket) -> None:
    """Read the server's first frame, and acknowledge its SETTINGS."""
    octets = b""
    while len(octets) < wire.HEAD or len(octets) < wire.HEAD + int.from_bytes(octets[:3], "big"):
        data = sock.recv(4096)
        if not data:
            raise WrongAnswer("the server closed an idle connection")
        octets += data
    sock.sendall(wire.frame(wire.SETTINGS, wire.ACK, 0))


class SlowReaders:
    """Clients that request catalogues with large windows and read slowly. The octets that they read are not checked."""

    def __init__(self, job: Job) -> None:
        self._held: list[socket.socket] = []
        self._octets = self._gone = 0
        self._next = 0.0
        block = wire.literal_block(job.fields(wire.SYNC_CATALOG))
        for _ in range(job.slow):
            sock = connect(job.port, receive_buffer=_SLOW_BUFFER, seconds=job.patience, tls=job.tls)
            self._held.append(sock)
            requests = [
                wire.frame(wire.HEADERS, wire.END_HEADERS, stream, block)
                + wire.frame(wire.DATA, wire.END_STREAM, stream, wire.message(b""))
                for stream in range(1, 2 * _SLOW_ASKED, 2)
            ]
            sock.sendall(wire.opening() + b"".join(requests))
            sock.setblocking(False)

    def step(self) -> None:
        """Read a little on each connection whose next read is due."""
        now = monotonic()
        if now < self._next:
            return
        self._next = now + _SLOW_SECONDS
        for sock in tuple(self._held):
            try:
                octets = len(sock.recv(_SLOW_OCTETS))
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
            except OSError:
                octets = 0
            if not octets:
                self._held.remove(sock)
                self._gone += 1
                sock.close()
            self._octets += octets

    def close(self) -> dict[str, Any]:
        """Close the connections. Returns their number, the octets requested and read, and how many the server
        disconnected."""
        count = len(self._held) + self._gone
        for sock in self._held:
            sock.close()
        figures = {"connections": count, "catalogues_asked_each": _SLOW_ASKED, "octets_read": self._octets}
        return figures | {"thrown_out": self._gone}
