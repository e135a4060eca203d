"""The transport of a TLS connection; the test plays the TCP transport below it."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest
from tests.support.certificates import Authority, Certificate
from tests.support.loop import eventually

from grpc_h2 import TlsCredentials
from grpc_h2.aio import tls_transport
from grpc_h2.aio.arrival import Handshake
from grpc_h2.aio.tls_transport import Secured, TlsTransport


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Authority(tmp_path_factory.mktemp("authority")).sign("server")


class Tcp(asyncio.Transport):
    """The TCP transport, which the event loop provides otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reading = True
        self.made = False
        """Whether `connection_made` has returned: until then, both event loops ignore a pause."""
        self.ended: list[str] = []

    def write(self, data: Any) -> None:
        self.written += data

    def write_eof(self) -> None:
        self.ended.append("end of file")

    def pause_reading(self) -> None:
        self.reading = not self.made

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.ended.append("closed")

    def abort(self) -> None:
        self.ended.append("aborted")

    def is_closing(self) -> bool:
        return bool({"closed", "aborted"} & {*self.ended})


class Application(Secured):
    """A protocol that notes its input and its events."""

    transport: TlsTransport

    def __init__(self) -> None:
        self.received = b""
        self.patient = False
        """Whether the protocol refuses to have records decrypted for now."""
        self.events: list[str] = []
        self.answer = b""
        """The octets with which each input is answered."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def may_decrypt(self) -> bool:
        if self.patient:
            self.transport.pause_reading()
        return not self.patient

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.transport.write(self.answer)

    def eof_received(self) -> None:
        self.events.append("eof")

    def broke_tls(self, error: OSError) -> None:
        self.events.append(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("lost")


class Connection:
    """A client in memory, and the server's transport, protocol and TCP transport. ``behind``: octets that the client
    sends directly after its part of the handshake."""

    def __init__(self, certificate: Certificate, behind: bytes = b"") -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self.arrived, self.made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(self.arrived, self.made)
        handshake = Handshake(TlsCredentials(certificate.cert, certificate.key).context)
        with pytest.raises(ssl.SSLWantReadError):
            self.client.do_handshake()
        assert not handshake.proceed(self.made.read())
        self.arrived.write(handshake.outgoing.read())
        self.client.do_handshake()
        if behind:
            self.client.write(behind)
        assert handshake.proceed(self.made.read())
        self.arrived.write(handshake.outgoing.read())
        self.tcp, self.application = Tcp(), Application()
        self.transport = TlsTransport(asyncio.get_running_loop(), self.application, handshake)
        self.transport.connection_made(self.tcp)
        self.tcp.made = True

    def send(self, *pieces: bytes) -> None:
        """Send each piece as one record."""
        for piece in pieces:
            self.client.write(piece)
        self.transport.data_received(self.made.read())

    def records(self) -> list[bytes]:
        """The records that the server has written since the last call."""
        octets, found = self.tcp.written, []
        while octets:
            end = 5 + int.from_bytes(octets[3:5], "big")
            found.append(octets[:end])
            octets = octets[end:]
        self.tcp.written = b""
        return found

    def lose(self) -> None:
        self.transport.connection_lost(None)
        assert self.application.events[-1] == "lost"


async def test_data_sent_with_the_end_of_the_handshake_is_received(certificate: Certificate) -> None:
    connection = Connection(certificate, behind=b"request")
    await eventually(lambda: connection.application.received == b"request", "it is received")
    connection.lose()


async def test_reading_can_be_paused_while_data_sent_with_the_end_of_the_handshake_is_decrypted(
    certificate: Certificate,
) -> None:
    connection = Connection(certificate, behind=b"request")
    application = connection.application
    application.data_received = lambda _: application.transport.pause_reading()  # type: ignore[method-assign]
    await eventually(lambda: not connection.tcp.reading, "nothing more is read")
    connection.lose()


async def test_pieces_that_are_written_together_share_one_record(certificate: Certificate) -> None:
    connection = Connection(certificate)
    pieces = [b"%03d" % number for number in range(32)]
    connection.transport.writelines(pieces)
    (record,) = connection.records()
    connection.arrived.write(record)
    assert connection.client.read(1000) == b"".join(pieces)
    connection.transport.writelines([])
    connection.transport.write(b"")
    assert not connection.records()
    connection.lose()


async def test_a_write_longer_than_a_record_is_written_completely(certificate: Certificate) -> None:
    connection = Connection(certificate)
    sent = bytes(range(256)) * 400
    connection.transport.write(memoryview(sent))
    records = connection.records()
    assert len(records) == -(-len(sent) // 16_384)
    connection.arrived.write(b"".join(records))
    received = b""
    while len(received) < len(sent):
        received += connection.client.read(100_000)
    assert received == sent
    connection.lose()


async def test_reading_pauses_while_records_may_not_be_decrypted(certificate: Certificate) -> None:
    connection = Connection(certificate)
    application, tcp = connection.application, connection.tcp
    application.patient = True
    connection.send(b"one")
    connection.send(b"two")
    assert (application.received, tcp.reading) == (b"", False)
    connection.transport.resume_reading()
    assert (application.received, tcp.reading) == (b"", False)
    await eventually(lambda: tcp.reading, "it is read again once what has arrived is decrypted")
    assert application.received == b"onetwo"
    connection.transport.pause_reading()
    connection.transport.resume_reading()
    assert tcp.reading, "nothing waits"
    connection.lose()


async def test_a_close_sends_close_notify_and_the_end_after_all_output_and_waits_for_the_end_of_the_peer(
    certificate: Certificate,
) -> None:
    connection = Connection(certificate)
    connection.transport.write(b"last words")
    connection.transport.close()
    connection.transport.write(b"too late")
    assert (connection.transport.is_closing(), connection.tcp.ended) == (True, ["end of file"])
    connection.arrived.write(b"".join(connection.records()))
    assert connection.client.read(100) == b"last words"
    assert connection.client.read(100) == b"", "close_notify"
    assert connection.transport.eof_received() is False, "the loop's transport closes"
    connection.lose()
    assert connection.application.events == ["lost"]


async def test_octets_that_arrive_on_a_closing_connection_are_thrown_away_without_decryption(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_transport, "OCTETS", 1000)
    connection = Connection(certificate)
    connection.transport.pause_reading()
    connection.transport.close()
    assert connection.tcp.reading
    connection.transport.data_received(b"no record" * 100)
    assert (connection.application.received, connection.tcp.ended) == (b"", ["end of file"])
    connection.transport.data_received(b"no record" * 100)
    assert connection.tcp.ended == ["end of file", "aborted"]
    connection.lose()


async def test_a_peer_that_does_not_end_a_closed_connection_in_time_is_aborted(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_transport, "LINGER", 0.01)
    connection = Connection(certificate)
    connection.transport.close()
    await eventually(lambda: connection.tcp.ended == ["end of file", "aborted"], "it is ended")
    connection.lose()


async def test_the_close_notify_of_the_peer_ends_the_connection(certificate: Certificate) -> None:
    connection = Connection(certificate)
    connection.client.write(b"request")
    with pytest.raises(ssl.SSLWantReadError):
        connection.client.unwrap()
    connection.transport.data_received(connection.made.read())
    assert (connection.application.received, connection.application.events) == (b"request", ["eof"])
    assert connection.tcp.ended == ["closed"]
    connection.arrived.write(b"".join(connection.records()))
    connection.client.unwrap()
    connection.lose()


async def test_octets_behind_the_close_notify_of_the_peer_do_not_stay_in_memory(certificate: Certificate) -> None:
    """The peer decides how long the output is flushed."""
    connection = Connection(certificate)
    with pytest.raises(ssl.SSLWantReadError):
        connection.client.unwrap()
    connection.transport.data_received(connection.made.read() + bytes(250_000))
    tls = connection.transport.get_extra_info("ssl_object")
    assert connection.application.events == ["eof"]
    assert (tls._arrived.pending, tls._piece.pending) == (0, 0)
    connection.lose()


async def test_the_end_of_tcp_without_close_notify_ends_the_connection(certificate: Certificate) -> None:
    connection = Connection(certificate)
    assert connection.transport.eof_received() is False
    assert connection.application.events == ["eof"]
    assert connection.transport.is_closing()
    connection.lose()


async def test_output_is_flushed_for_as_long_as_the_protocol_allows_after_the_close_notify_of_the_peer(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_transport, "LINGER", 0.01)
    loop = asyncio.get_running_loop()
    connection = Connection(certificate)
    connection.transport.write(b"answer")
    with pytest.raises(ssl.SSLWantReadError):
        connection.client.unwrap()
    connection.transport.data_received(connection.made.read())
    late = loop.time() + 0.05
    await eventually(lambda: loop.time() > late, "more time has passed than a closed connection has")
    assert connection.tcp.ended == ["closed"]
    connection.lose()


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "after a time slice"])
async def test_a_peer_that_breaks_tls_gets_an_alert_and_no_answer(certificate: Certificate, deferred: bool) -> None:
    connection = Connection(certificate)
    connection.application.answer = b"answer"
    connection.application.patient = deferred
    connection.client.write(b"request")
    connection.transport.data_received(connection.made.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
    if deferred:
        connection.transport.resume_reading()
        await eventually(lambda: bool(connection.tcp.ended), "it is closed")
    assert connection.tcp.ended == ["end of file"]
    (reason,) = connection.application.events
    assert reason.startswith("[SSL: ")
    connection.arrived.write(b"".join(connection.records()))
    with pytest.raises(ssl.SSLError, match=r"(?i)alert bad record mac"):
        connection.client.read(1)
    connection.transport.write(b"more")
    assert not connection.records()
    connection.lose()


async def test_data_that_arrived_earlier_than_a_broken_record_is_received(certificate: Certificate) -> None:
    connection = Connection(certificate)
    connection.send(b"request")
    connection.transport.data_received(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert connection.application.received == b"request"
    connection.lose()


async def test_a_bug_that_deferred_records_cause_ends_the_connection(certificate: Certificate) -> None:
    """As one that other records cause: there the loop's transport does it."""
    bugs: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: bugs.append(context))
    connection = Connection(certificate)
    application = connection.application
    application.patient = True

    def fail(_: bytes) -> None:
        raise ValueError("a bug")

    application.data_received = fail  # type: ignore[method-assign]
    connection.send(b"request")
    connection.transport.resume_reading()
    await eventually(lambda: connection.tcp.ended == ["aborted"], "it is ended")
    assert [str(context["exception"]) for context in bugs] == ["a bug"]
    connection.lose()
