"""Recognises peers that speak something else, by their first octets, and holds an answer in their own protocol.

A wrong scheme, port or proxy option is the most frequent fault of a new installation, and with most servers the user
sees only "connection reset". Here an HTTP/1.1 client gets a line of text that names the protocol of the port, a TLS
client gets an alert, and the operator's log names the protocol that was received.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from grpc_h2.wire import frames

CLEARTEXT: Final = "gRPC over HTTP/2 without TLS"
SECURE: Final = "gRPC over HTTP/2 with TLS"
_MOST: Final = 4096
"""The most octets that are kept while the first line is incomplete."""
_HTTP1_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) [^\r\n]+ HTTP/1\.\d\r?\n")
_HTTP09_LINE: Final = re.compile(rb"GET /[^ \r\n]*\r?\n")
_BEGUN_LINE: Final = re.compile(rb"[A-Z]{1,16}( [^\r\n]*)?\r?")
_PROXY_V1: Final = b"PROXY "
_PROXY_V2: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_TLS_HANDSHAKE: Final = b"\x16\x03"
_SSH: Final = b"SSH-"
NO_APPLICATION_PROTOCOL: Final = b"\x15\x03\x03\x00\x02\x02\x78"
"""The fatal alert "no_application_protocol" (RFC 8446 section 6; RFC 7301 section 3.2)."""
_PROTOCOL_VERSION: Final = b"\x15\x03\x03\x00\x02\x02\x46"
"""The alert for a TLS client on a port without TLS: this port supports no version of TLS. A TLS server does not send
this alert to today's clients."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A protocol that this port does not serve."""

    name: str
    """The protocol's name for the log."""
    answer: bytes = b""
    """An answer in that protocol; empty if there is none."""


def recognise(octets: bytes, *, speaks: str, whole: bool = False) -> Foreign | None:
    """The protocol of a peer that begins with these octets. None if it is not known, or may still be the protocol of
    this port.

    Args:
        octets: The first octets.
        speaks: The protocol of this port: `CLEARTEXT` or `SECURE`.
        whole: Whether to judge an incomplete line too.
    """
    if speaks == SECURE and octets[:4] == frames.PREFACE[:4]:
        # The answer is not in HTTP/2: a gRPC client that gets SETTINGS considers itself connected, and repeats its
        # calls until their deadlines. An answer in HTTP/1.1 ends the calls at once, and clients show it in their
        # errors.
        return Foreign("HTTP/2 without TLS", _http1(speaks, "HTTP/2 without TLS"))
    line = _HTTP1_LINE.match(octets)
    if line is not None:
        return Foreign("HTTP/1.1", _http1(speaks, "HTTP/1.1", head=line[1] == b"HEAD"))
    if _HTTP09_LINE.match(octets) or (whole and octets[:5] in _METHODS):
        return Foreign("HTTP/1.1", _http1(speaks, "HTTP/1.1"))
    if octets.startswith(_PROXY_V1):
        return Foreign("PROXY protocol v1")
    if octets.startswith(_PROXY_V2):
        return Foreign("PROXY protocol v2")
    if octets.startswith(_TLS_HANDSHAKE) and speaks == CLEARTEXT:
        return Foreign("TLS", _PROTOCOL_VERSION)
    if octets.startswith(_SSH):
        return Foreign("SSH")
    return None


_METHODS: Final = (b"GET /", b"POST ", b"PUT /", b"HEAD ", b"OPTIO", b"DELET", b"PATCH", b"CONNE", b"TRACE")


def undecided(octets: bytes) -> bool:
    """Whether `recognise` may know the protocol once more octets have arrived, so that it is worth waiting for them."""
    if _PROXY_V2.startswith(octets[: len(_PROXY_V2)]) or _TLS_HANDSHAKE.startswith(octets[:2]):
        return len(octets) < len(_PROXY_V2)
    return len(octets) < _MOST and _BEGUN_LINE.fullmatch(octets) is not None


class FirstOctets:
    """The first octets of a connection, until it is clear whether they are HTTP/2's preface."""

    __slots__ = ("_octets",)

    def __init__(self) -> None:
        self._octets = b""

    def take(self, data: bytes, *, secure: bool) -> bytes | Foreign | None:
        """``data`` has arrived; ``secure``: it arrived through TLS.

        Returns:
            All octets that have arrived, for the connection to process; or the foreign protocol that the peer speaks;
            or None if too few octets have arrived.
        """
        octets = self._octets + data
        preface = frames.PREFACE
        if octets[: len(preface)] == preface[: len(octets)]:
            wait = len(octets) < len(preface)
        elif secure:
            wait = False
        else:
            foreign = recognise(octets, speaks=CLEARTEXT)
            if foreign is not None:
                return foreign
            wait = undecided(octets)
        if not wait:
            return octets
        self._octets = octets
        return None


def _http1(speaks: str, received: str, *, head: bool = False) -> bytes:
    text = f"This port speaks {speaks}, not {received}: use a gRPC client.\n".encode()
    lines = (
        b"HTTP/1.1 400 Bad Request",
        b"Content-Type: text/plain; charset=utf-8",
        b"Content-Length: %d" % len(text),
        b"Connection: close",
        b"",
        b"" if head else text,
    )
    return b"\r\n".join(lines)


def goaway(code: int, reason: str) -> bytes:
    """All octets that a server sends to refuse a connection: SETTINGS (RFC 9113 section 3.4) and GOAWAY."""
    return frames.settings(()) + frames.goaway(0, code, reason.encode())
