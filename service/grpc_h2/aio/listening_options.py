"""The options of a listening socket. The process that makes the socket sets them, because other processes that share it
may be confined."""

from __future__ import annotations

import socket
import struct

_RECEIVE_BUFFER = 128 * 1024
"""Octets of a connection that the kernel buffers for us (it doubles the number for its own needs). The kernel's default
grows up to 6 MB (``tcp_rmem``, tcp(7)). Reading 6 MB at once, or freeing them at the end, takes milliseconds in which
no other connection is served. A request takes hundreds of octets."""
_KEEPALIVE_SECONDS = 60
"""Seconds between TCP keepalive probes. By these probes the kernel notices a vanished peer, without waking this
process."""
_ACCEPT_TIMEOUT = struct.pack("@ll", 0, 1000)
"""The ``timeval`` of a millisecond; the kernel rounds it up to a tick (1 to 10 ms)."""


def set_listening_options(listening: socket.socket) -> None:
    """Set the options that accepted connections inherit, and the options that accept(2) needs.

    All processes that share the socket share its O_NONBLOCK: a hostile process may clear it, and accept(2) would then
    wait for ever in the others. With SO_RCVTIMEO, accept(2) waits for at most one tick of the kernel (socket(7)); the
    option has no effect on a non-blocking socket.

    Raises:
        PermissionError: if this process may not set them.
    """
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _ACCEPT_TIMEOUT)
    if listening.family in (socket.AF_INET, socket.AF_INET6):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
