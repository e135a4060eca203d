"""The transport of a TLS connection whose handshake is done: records on the loop's transport, octets for the protocol.

**Theory of operation.** Event loops have such a transport of their own. It decrypts records as soon as they arrive,
without a scheduler: if hundreds of peers send at the same moment, every other connection waits for all of them. So this
transport asks the protocol first (`Secured.may_decrypt`). Records that may not be decrypted yet are kept, and nothing
more is read from the socket, until the protocol resumes reading in its time slice.

Written octets are encrypted at once and passed to the loop's transport. The limits of that transport's write buffer
apply to this transport. Pieces that are written together share records of up to 16 kB.

**Closing.** `TlsTransport.close` sends close_notify and the end of the TCP stream behind the written octets. Octets
that arrive from then on are thrown away without decryption, which would take CPU time. The connection ends when the
peer closes its side, after `LINGER` seconds, or after `lingering_close.OCTETS` octets. A record that cannot be
decrypted closes the connection in the same way, behind OpenSSL's alert.

The peer's close_notify ends both directions, as in every gRPC implementation, and the written octets are flushed. The
end of the TCP connection without close_notify does the same, but no close_notify is sent in return. In both cases the
protocol sets the time limit (`asyncio.Protocol.eof_received`).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, cast

from grpc_h2.aio.arrival import Handshake
from grpc_h2.aio.lingering_close import LINGER, OCTETS

_RECORD: Final = 16 * 1024
"""The most octets that a record holds (RFC 8446, section 5.1): a read returns the octets of one record at most."""

Octets = bytes | bytearray | memoryview


class Secured(asyncio.Protocol):
    """A protocol that decides when its records are decrypted."""

    __slots__ = ()

    def may_decrypt(self) -> bool:
        """Records have arrived. Returns whether they may be decrypted now. Otherwise the protocol has paused the
        transport, and resumes it when they may be decrypted."""
        raise NotImplementedError

    def broke_tls(self, error: OSError) -> None:
        """A record cannot be decrypted, or the peer sent an alert: the transport is about to close."""
        raise NotImplementedError


class TlsTransport(asyncio.Protocol, asyncio.Transport):
    """A transport for its protocol, and the protocol of the loop's transport."""

    __slots__ = (
        "_closing",
        "_incoming",
        "_loop",
        "_outgoing",
        "_paused",
        "_protocol",
        "_tcp",
        "_tcp_paused",
        "_thrown_away",
        "_timer",
        "_tls",
        "_write",
    )

    _tcp: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: Secured, handshake: Handshake) -> None:
        """``handshake`` is done. It may hold records that arrived with its last octets."""
        self._loop = loop
        self._protocol: Secured | None = protocol
        self._tls = handshake.tls
        self._incoming = handshake.incoming
        self._outgoing = handshake.outgoing
        self._write = handshake.tls.write
        self._paused = False
        """Whether the protocol has paused reading."""
        self._tcp_paused = False
        self._closing = False
        self._thrown_away = 0
        """Octets that have arrived since `close`."""
        self._timer: asyncio.TimerHandle | None = None

    # -- called by the loop's transport ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`. Records that arrived with the end of the handshake are decrypted in the next
        iteration of the loop: until this method has returned, the loop's transport ignores a pause."""
        self._tcp = cast(asyncio.Transport, transport)
        assert self._protocol is not None
        self._protocol.connection_made(self)
        if self._pending:
            self._loop.call_soon(self._read_on)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._closing:
            self._throw_away(len(data))
            return
        self._incoming.write(data)
        if not self._paused and self._protocol is not None and self._protocol.may_decrypt():
            self._read()

    def eof_received(self) -> bool:
        """See `asyncio.Protocol`. The loop's transport flushes, and closes."""
        if not self._closing and self._protocol is not None:
            self._closing = True
            self._protocol.eof_received()
        return False

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        if self._protocol is not None:
            self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        protocol, self._protocol = self._protocol, None  # ends a reference cycle
        if protocol is not None:
            protocol.connection_lost(exc)

    # -- called by the protocol: reading --------------------------------------------------------------------------

    def is_reading(self) -> bool:
        """See `asyncio.ReadTransport`."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """See `asyncio.ReadTransport`. The kernel keeps octets that arrive from now on."""
        if self._closing:
            return
        self._paused = True
        if not self._tcp_paused and not self._tcp.is_closing():
            self._tcp_paused = True
            self._tcp.pause_reading()

    def resume_reading(self) -> None:
        """See `asyncio.ReadTransport`. Records that have arrived are decrypted in the next iteration of the loop."""
        if not self._paused:
            return
        self._paused = False
        if self._pending:
            self._loop.call_soon(self._read_on)
        else:
            self._read_tcp()

    @property
    def _pending(self) -> bool:
        """Whether octets have arrived that the protocol has not received."""
        return bool(self._incoming.pending or self._tls.pending())

    def _read_on(self) -> None:
        if self._paused or self._closing:
            return
        try:
            self._read()
        except BaseException:  # the loop's transport ends a connection whose protocol raises, but knows nothing of this
            self.abort()
            raise
        if not self._paused and not self._closing:
            self._read_tcp()

    def _read_tcp(self) -> None:
        if self._tcp_paused and not self._tcp.is_closing():
            self._tcp_paused = False
            self._tcp.resume_reading()

    def _read(self) -> None:
        """Decrypt the records that have arrived, for one time slice, and hand the octets to the protocol. Octets that
        were decrypted in the same time slice as a broken record are dropped: the answer could not be encrypted."""
        tls, incoming, protocol = self._tls, self._incoming, self._protocol
        assert protocol is not None
        octets, more, ended = b"", [], False
        try:
            # A check before the call is cheaper than OpenSSL's SSLWantReadError.
            while incoming.pending or tls.pending():
                found = tls.read(_RECORD)
                if not found:
                    ended = True
                    break
                if octets:
                    more.append(found)
                else:
                    octets = found
        except ssl.SSLWantReadError:
            pass
        except OSError as error:
            protocol.broke_tls(error)
            self.close()
            return
        if octets:
            protocol.data_received(b"".join((octets, *more)) if more else octets)
        if self._outgoing.pending:
            self._send()
        if ended and not self._closing:
            self._closed_by_peer(protocol)

    def _closed_by_peer(self, protocol: Secured) -> None:
        """The peer has sent close_notify. The loop's transport flushes, and closes."""
        self._closing = True
        self._tls.discard()  # the peer decides how long the output is flushed
        with suppress(OSError):
            self._tls.unwrap()
        self._send()
        protocol.eof_received()
        self._tcp.close()

    # -- called by the protocol: writing --------------------------------------------------------------------------

    def write(self, data: Octets) -> None:
        """See `asyncio.WriteTransport`."""
        if data and not self._closing:
            written = self._write(data)
            if written < len(data):
                self._write_rest(data, written)
            self._tcp.write(self._outgoing.read())

    def writelines(self, list_of_data: Iterable[Octets]) -> None:
        """See `asyncio.WriteTransport`."""
        self.write(b"".join(list_of_data))

    def _write_rest(self, data: Octets, written: int) -> None:
        """Encrypt ``data``. OpenSSL takes one record at a time."""
        rest = memoryview(data)[written:]
        while rest:
            rest = rest[self._write(rest) :]

    def _send(self) -> None:
        if not self._tcp.is_closing():
            self._tcp.write(self._outgoing.read())

    def get_write_buffer_size(self) -> int:
        """See `asyncio.WriteTransport`: the size of the records, not of the octets in them."""
        return self._tcp.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See `asyncio.WriteTransport`."""
        self._tcp.set_write_buffer_limits(high, low)

    def can_write_eof(self) -> bool:
        """See `asyncio.WriteTransport`: closing one direction ends the connection."""
        return False

    # -- called by the protocol: the rest -------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See `asyncio.BaseTransport`."""
        return self._tls if name == "ssl_object" else self._tcp.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """See `asyncio.BaseTransport`."""
        return self._closing or self._tcp.is_closing()

    def close(self) -> None:
        """See `asyncio.BaseTransport`."""
        if self._closing:
            return
        self._closing = True
        if self._tcp.is_closing():
            return
        self._timer = self._loop.call_later(LINGER, self._tcp.abort)
        self._read_tcp()
        self._tls.discard()
        with suppress(OSError):  # close_notify is written first; the peer's, which is awaited then, cannot arrive
            self._tls.unwrap()
        self._send()
        try:
            self._tcp.write_eof()
        except OSError:  # the peer has closed already, so the socket is not connected any more
            self._tcp.abort()

    def abort(self) -> None:
        """See `asyncio.WriteTransport`."""
        self._closing = True
        self._tcp.abort()

    def _throw_away(self, octets: int) -> None:
        self._thrown_away += octets
        if self._thrown_away > OCTETS:
            self._tcp.abort()
