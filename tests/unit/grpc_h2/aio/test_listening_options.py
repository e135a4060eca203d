"""The socket options that accepted connections inherit from the listening socket."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from grpc_h2 import set_listening_options


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_a_tcp_socket_has_nodelay_a_small_receive_buffer_and_keepalive(family: socket.AddressFamily) -> None:
    if family == socket.AF_INET6 and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        set_listening_options(listening)
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 128 * 1024, "the kernel doubles it"
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_accept_on_a_unix_socket_waits_for_ten_milliseconds_at_most(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        set_listening_options(listening)
        seconds, microseconds = struct.unpack("@ll", listening.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
        assert seconds == 0
        assert 0 < microseconds <= 10_000, "a tick of the kernel"
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        with pytest.raises(BlockingIOError):
            listening.accept()
