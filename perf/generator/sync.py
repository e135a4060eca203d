"""Reads whole catalogues repeatedly and compares every octet."""

from __future__ import annotations

import select
import ssl
from array import array
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from tests.support import wire

from definition_server.catalog.snapshot import Snapshot
from perf.generator.answers import HeaderBlocks, WrongAnswer, prefix
from perf.generator.connection import connect
from perf.generator.histogram import counted, encode
from perf.generator.job import Job
from perf.generator.loops import Beside, Span

_BUFFER = 1 << 20
_PREFIX = 5
_CREDIT = 1 << 28


class CatalogueReader:
    """One connection that requests the catalogue, reads it, and requests it again.

    The body is compared in the receive buffer, without a copy of the whole: the body may have hundreds of megabytes.
    """

    def __init__(self, job: Job, expected: memoryview) -> None:
        self.sock = connect(job.port, seconds=job.patience, tls=job.tls)
        self.octets = 0
        """Octets of catalogues read so far."""
        self.asked_at = 0.0
        self._expected = expected
        self._head = prefix(len(expected))
        self._block = wire.literal_block(job.fields(wire.SYNC_CATALOG))
        self._headers = HeaderBlocks()
        self._buffer = memoryview(bytearray(_BUFFER))
        self._held = self._uncredited = 0
        self._stream = -1
        self._at = -_PREFIX
        self.sock.sendall(wire.opening())

    @property
    def pending(self) -> bool:
        """Whether TLS holds decrypted octets that were not read yet; epoll does not report them."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0

    def ask(self) -> None:
        """Request the catalogue."""
        self._stream += 2
        self._at = -_PREFIX
        self.asked_at = monotonic()
        request = wire.frame(wire.HEADERS, wire.END_HEADERS, self._stream, self._block)
        self.sock.sendall(request + wire.frame(wire.DATA, wire.END_STREAM, self._stream, wire.message(b"")))

    def receive(self) -> bool:
        """Read once. Returns whether the catalogue is complete.

        Raises:
            WrongAnswer: for wrong octets or a lost connection.
        """
        try:
            received = self.sock.recv_into(self._buffer[self._held :])
        except TimeoutError:
            raise WrongAnswer(f"the catalogue stopped after {max(0, self._at):,} octets") from None
        except OSError as error:
            raise WrongAnswer(f"the connection was lost during a catalogue: {error}") from error
        if not received:
            raise WrongAnswer(f"the server closed the connection after {max(0, self._at):,} octets of a catalogue")
        end, place, complete = self._held + received, 0, False
        while end - place >= wire.HEAD:
            after = place + wire.HEAD + int.from_bytes(self._buffer[place : place + 3], "big")
            if after > end:
                break
            kind, flags = self._buffer[place + 3], self._buffer[place + 4]
            complete |= self._frame(kind, flags, self._buffer[place + wire.HEAD : after])
            place = after
        self._held = end - place
        self._buffer[: self._held] = bytes(self._buffer[place:end])
        return complete

    def _frame(self, kind: int, flags: int, payload: memoryview) -> bool:
        if kind == wire.DATA:
            self._data(payload)
        elif kind == wire.HEADERS:
            self._fields(self._headers.fields(bytes(payload)), bool(flags & wire.END_STREAM))
        elif kind in (wire.RST_STREAM, wire.GOAWAY):
            raise WrongAnswer(f"a frame of type {kind} within a catalogue: {bytes(payload[:60])!r}")
        elif kind == wire.PING and not flags & wire.ACK:
            self.sock.sendall(wire.frame(wire.PING, wire.ACK, 0, bytes(payload)))
        elif kind == wire.SETTINGS and not flags & wire.ACK:
            self.sock.sendall(wire.frame(wire.SETTINGS, wire.ACK, 0))
        if kind not in (wire.DATA, wire.HEADERS) or not flags & wire.END_STREAM:
            return False
        if self._at != len(self._expected):
            raise WrongAnswer(f"the answer ended after {max(0, self._at):,} of {len(self._expected):,} octets")
        return True

    def _data(self, payload: memoryview) -> None:
        octets = len(payload)
        self._uncredited += octets
        if self._uncredited > _CREDIT:
            self.sock.sendall(wire.window_update(0, self._uncredited))
            self._uncredited = 0
        if self._at < 0:
            skipped = min(-self._at, octets)
            start = _PREFIX + self._at
            if payload[:skipped] != self._head[start : start + skipped]:
                raise WrongAnswer(f"a message that begins with {bytes(payload[:_PREFIX]).hex()}")
            self._at, payload = self._at + skipped, payload[skipped:]
        if not payload:
            return
        if bytes(payload) != bytes(self._expected[self._at : self._at + len(payload)]):  # a memcmp, not a loop
            raise WrongAnswer(f"the catalogue differs near octet {self._at:,}")
        self._at += len(payload)
        self.octets += len(payload)

    def _fields(self, fields: dict[bytes, bytes], last: bool) -> None:
        if fields.get(b":status", b"200") != b"200":
            raise WrongAnswer(f"HTTP status {fields[b':status']!r}")
        status = fields.get(b"grpc-status")
        if status != b"0" and (last or status is not None):
            raise WrongAnswer(f"gRPC status {status!r} {fields.get(b'grpc-message')!r}, expected 0")


class Catalogues:
    """The connections of one job, as `perf.generator.loops.Load`. The caller closes it."""

    def __init__(self, job: Job, snapshot: Snapshot) -> None:
        self.job = job
        self.length = len(snapshot.body)
        self.poll = select.epoll()
        self.readers: dict[int, CatalogueReader] = {}
        try:
            for _ in range(job.connections):
                made = CatalogueReader(job, snapshot.body)
                self.readers[made.sock.fileno()] = made
                self.poll.register(made.sock.fileno(), select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    @property
    def octets(self) -> int:
        """Octets of catalogues read so far."""
        return sum(each.octets for each in self.readers.values())

    def close(self) -> None:
        """Close every connection."""
        for reader in self.readers.values():
            reader.sock.close()
        self.poll.close()


def sync(load: Catalogues, beside: Sequence[Beside], start: float, measuring: Callable[[], None]) -> dict[str, Any]:
    """Keep one catalogue in flight on each connection until the time is over, then read those in flight to their end.

    Parts of catalogues are also counted: ``answered`` is the number of octets divided by the length of a catalogue.

    Raises:
        WrongAnswer: for a catalogue that is wrong or does not arrive.
    """
    job, span, latencies = load.job, Span(load.job), array("d")
    measured_from = start + job.warmup
    end = measured_from + job.seconds
    asking = len(load.readers)
    for reader in load.readers.values():
        reader.ask()
    result: dict[str, Any] = {}
    heard = monotonic()
    while asking:
        events = load.poll.poll(0.05)
        now = monotonic()
        if not span.began and now >= measured_from:
            span.start(load.octets / load.length)
            measuring()
        elif not result and now >= end:
            result = span.result(load.octets / load.length)
        if not events and now - heard > job.patience:
            raise WrongAnswer(f"no octet of a catalogue arrived within {job.patience:g} s")
        heard = now if events else heard
        for descriptor, _ in events:
            reader = load.readers[descriptor]
            again = True
            while again:
                if reader.receive():
                    if reader.asked_at >= measured_from:
                        latencies.append(monotonic() - reader.asked_at)
                    if now >= end:
                        asking -= 1
                    else:
                        reader.ask()
                again = reader.pending
        for each in beside:
            each.step()
    octets = result["answered"] * load.length
    return result | {"octets": octets, "taken_apart": 0, "histogram": encode(counted(latencies))}
