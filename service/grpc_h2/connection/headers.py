"""Header blocks that come in parts."""

from __future__ import annotations

from grpc_h2.connection.limits import Limits
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode


class BlockAssembly:
    """A header block that has begun and is not dealt with (section 6.10): nothing else may come in between."""

    __slots__ = ("_continuations", "_limits", "_parts", "end_stream", "self_dependent", "stream_id", "whole")

    def __init__(
        self, limits: Limits, stream_id: int, fragment: bytes, *, end_stream: bool, self_dependent: bool
    ) -> None:
        self._limits = limits
        self.stream_id = stream_id
        self.end_stream = end_stream
        self.self_dependent = self_dependent
        self._parts = bytearray(fragment)
        self._continuations = 0
        self.whole: bytes | None = None
        """The block, once it has come to its end and waits to be decoded."""

    def add(self, kind: int, stream_id: int, fragment: bytes) -> None:
        """The next frame.

        Raises:
            ConnectionFault: PROTOCOL_ERROR where it is no CONTINUATION of this block; ENHANCE_YOUR_CALM where the
                block comes in too many frames or is too long (VU#421644).
        """
        if kind != frames.CONTINUATION or stream_id != self.stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame inside a header block")
        self._continuations += 1
        if self._continuations > self._limits.max_continuations:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header block in too many CONTINUATION frames")
        self._parts += fragment
        if len(self._parts) > self._limits.max_header_block:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header block too long")

    def end(self) -> None:
        """The block has come to its end."""
        self.whole = bytes(self._parts)
