"""The faults of the proxy, tested on sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from tests.support.leftovers import nothing_left
from tests.support.polling import until
from tests.support.proxy import Proxy


@contextmanager
def echo(prefix: bytes) -> Iterator[str]:
    """Start a server that answers each connection's bytes with ``prefix`` and the same bytes. Returns its URL."""
    threads: list[threading.Thread] = []

    def answer(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            while data := peer.recv(65_536):
                peer.sendall(prefix + data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listener.accept()
                threads.append(threading.Thread(target=answer, args=(peer,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        yield f"postgresql://user@127.0.0.1:{listener.getsockname()[1]}/database"
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join(10)
        for thread in threads:
            thread.join(10)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with nothing_left(), echo(b"") as url, Proxy(url) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    port = int(proxy.url.rpartition(":")[2].partition("/")[0])
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.settimeout(5)
    return connection


def said(connection: socket.socket, data: bytes) -> bytes:
    """The answer to ``data``, of the same length."""
    connection.sendall(data)
    answer = b""
    while len(answer) < len(data) and (more := connection.recv(65_536)):
        answer += more
    return answer


def silent(connection: socket.socket, data: bytes) -> bool:
    """Whether ``data`` is accepted and not answered, and the connection stays open."""
    connection.sendall(data)
    connection.settimeout(0.3)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    return False


def test_a_limited_rate_delays_data_and_loses_none(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        data = bytes(range(256)) * 20
        proxy.bytes_per_second = 10_000
        began = time.monotonic()
        assert said(connection, data) == data
        assert time.monotonic() - began >= len(data) / 10_000 * 0.9
        proxy.bytes_per_second = None
        began = time.monotonic()
        assert said(connection, data * 20) == data * 20
        assert time.monotonic() - began < len(data) * 20 / 10_000 / 2


def test_a_black_hole_loses_the_data_of_old_and_new_connections(proxy: Proxy) -> None:
    with connect(proxy) as old:
        assert said(old, b"before") == b"before"
        proxy.swallow()
        with connect(proxy) as new:
            assert silent(old, b"lost")
            assert silent(new, b"lost")
            proxy.spit_out()
            assert silent(old, b"still lost")
            assert silent(new, b"still lost")
        with connect(proxy) as later:
            assert said(later, b"after") == b"after"


def test_a_changed_address_applies_to_new_connections(proxy: Proxy) -> None:
    with echo(b"other ") as url, connect(proxy) as old:
        assert said(old, b"here") == b"here"
        proxy.lead_to(url)
        assert until(lambda: old.recv(1) == b"", "the old connection ends")
        with connect(proxy) as new:
            new.sendall(b"there")
            assert until(lambda: new.recv(65_536), "an answer") == b"other there"
        proxy.cut()
