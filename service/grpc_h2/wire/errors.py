"""The peer's faults, each with the error code that is sent in answer.

`Http2Error` is the root of every exception of this package. A fault is the *peer's* and carries the code that GOAWAY or
RST_STREAM will name (``rpc/faults.py`` has the faults that are answered by a status). Any other exception that leaves
this package is a bug in this package.
"""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """The error codes of RFC 9113 section 7."""

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
    """A header block that cannot be decoded (RFC 9113 section 4.3): from now on, the tables of both ends may differ."""

    def __init__(self, reason: str) -> None:
        super().__init__(ErrorCode.COMPRESSION_ERROR, reason)


class StreamFault(Http2Error):
    """The peer broke one stream's rules (RFC 9113 section 5.4.2): RST_STREAM with ``code``."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
