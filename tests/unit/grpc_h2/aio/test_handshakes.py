"""The number of TLS handshakes that peers leave unfinished is limited, and they do not affect other peers."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.certificates import Authority
from tests.support.loop import eventually

from grpc_h2 import Server, TlsCredentials
from grpc_h2.aio import handshakes
from grpc_h2.aio.handshakes import Handshakes


def test_the_oldest_handshake_of_the_network_with_the_most_is_closed_for_a_new_one():
    ended: list[str] = []
    some = Handshakes(4)

    def begin(name: str, network: str) -> None:
        some.begin(name, network, lambda: ended.append(name))

    begin("honest", "10.0.0.1")
    for number in range(3):
        begin(f"crowd {number}", "10.0.0.2")
    assert (len(some), ended) == (4, [])
    begin("another", "10.0.0.3")
    assert (len(some), ended) == (4, ["crowd 0"])
    begin("crowd 3", "10.0.0.2")
    assert (len(some), ended) == (4, ["crowd 0", "crowd 1"])
    some.end("crowd 1", "10.0.0.2")
    assert len(some) == 4, "its handshake was ended before"
    for name, network in (("honest", "10.0.0.1"), ("another", "10.0.0.3"), ("crowd 2", "10.0.0.2")):
        some.end(name, network)
    assert len(some) == 1
    begin("crowd 4", "10.0.0.2")
    assert ended == ["crowd 0", "crowd 1"]


def first_flight() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def test_a_client_is_served_while_other_handshakes_are_never_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handshakes.Handshakes.__init__, "__defaults__", (8,))
    caplog.set_level("INFO", "grpc_h2")
    authority = Authority(tmp_path)
    certificate = authority.sign("localhost")
    server = Server()
    port = server.add_secure_port("127.0.0.1:0", TlsCredentials(certificate.cert, certificate.key))
    await server.start()
    hello = first_flight()

    def gave_way() -> bool:
        return any("there was no room for the next" in str(getattr(record, "error", "")) for record in caplog.records)

    with ExitStack() as stack:
        for _ in range(40):
            held = stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=("127.9.0.1", 0)))
            held.sendall(hello)
        await eventually(lambda: gave_way() and server.admission.held == 8, "40 handshakes have begun, and 8 are left")
        server.admission._known["127.9.0.2"] = None
        for _ in range(8):
            held = stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=("127.9.0.2", 0)))
            held.sendall(hello)
        await eventually(lambda: server.admission.held == 16, "handshakes from a client's address are counted apart")
        context = ssl.create_default_context(cafile=str(authority.cert))
        context.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        writer.close()
    await eventually(lambda: not server.admission.held, "no connection is held any more")
    [listener] = server._listeners
    assert [len(each) for each in listener._handshakes.values()] == [0, 0], "handshakes that are over are not counted"
    await server.stop(None)
