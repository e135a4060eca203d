"""What can go wrong, each with the code it has on the wire.

One root. A fault is the *peer's*; it carries the code that GOAWAY, RST_STREAM, ``grpc-status`` or ``:status`` will tell
it. Any other exception that leaves this package is a bug of ours.
"""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """RFC 9113 section 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class Http2Error(Exception):
    """Root of this package's exceptions."""


class ConnectionFault(Http2Error):
    """The peer broke the connection's rules (RFC 9113 section 5.4.1): GOAWAY with ``code``, then close."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class HpackError(ConnectionFault):
    """A header block that cannot be decoded (RFC 9113 section 4.3): the tables of both ends may differ from here on."""

    def __init__(self, reason: str) -> None:
        super().__init__(ErrorCode.COMPRESSION_ERROR, reason)


class StreamFault(Http2Error):
    """The peer broke one stream's rules (RFC 9113 section 5.4.2): RST_STREAM with ``code``."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class CallFault(Http2Error):
    """A call that fails before any handler sees it: ``grpc-status`` and ``grpc-message``.

    ``content_length`` is what the request announced, if it did: the length of its body must be judged all the same.
    """

    def __init__(self, status: int, message: str, content_length: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.content_length = content_length


class HttpFault(Http2Error):
    """A request that is HTTP but not gRPC: ``status``, and a short ``text`` as the body."""

    def __init__(self, status: int, text: str, content_length: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.content_length = content_length
