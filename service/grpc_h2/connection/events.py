"""Events that a connection reports to its server, in order. Ready answers do not produce events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpc_h2.connection.stream import Stream


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A request's headers have arrived and are in ``stream.request``."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """One whole message, decompressed. Call ``Connection.consumed`` once a handler has taken it."""

    stream: Stream
    message: bytes


@dataclass(frozen=True, slots=True)
class HalfClosed:
    """The client has sent all its messages."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class CallCancelled:
    """Nothing can be sent on the stream any more: the client reset the stream, broke the stream's rules, or is gone."""

    stream: Stream
    code: int
    """The error code of the RST_STREAM that was received or sent (RFC 9113 section 7)."""


@dataclass(frozen=True, slots=True)
class Writable:
    """A stream that had too much queued has room again."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class AnswerCutOff:
    """An answer was not read in time and is given up: RST_STREAM is queued. If the call has a handler, `CallCancelled`
    is also reported."""

    stream: Stream
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectionClosing:
    """The last GOAWAY is queued and no stream is left. The server must flush, continue to read for a second at most,
    and close."""

    code: int
    reason: str


Event = CallStarted | MessageReceived | HalfClosed | CallCancelled | Writable | AnswerCutOff | ConnectionClosing
