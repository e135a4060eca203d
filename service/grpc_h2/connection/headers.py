"""Received header blocks: assembles them from frames, decodes them, finds their routes, and remembers both.

**The memo of blocks.** Decoding is a function of the block and the HPACK table. A remembered block does not change the
table, and was decoded in the table's present state, because the memo is dropped at each change of the table. The
decoder counts changes (``epoch``), and `Headers.decode` is the only place that decodes blocks and compares epochs. A
block is remembered only if it leads to a static method. The memo is also dropped when the server's authorizations
change (`Headers.refresh`).

**Long blocks.** A block of more than `LONGEST_SHORT_BLOCK` octets is decoded a few fields at a time
(`Headers.end_assembly`), so that other connections are served in between. Until the block is decoded, no other frame of
the connection is processed.
"""

from __future__ import annotations

from sys import maxsize
from typing import Final

from grpc_h2.connection.abuse import BLOCK_WORK, OCTETS_OF_BLOCK_PER_WORK, Abuse
from grpc_h2.connection.limits import Limits
from grpc_h2.rpc.faults import CallFault
from grpc_h2.rpc.requests import split_timeout, timeout_seconds
from grpc_h2.rpc.status import StatusCode
from grpc_h2.static.routes import Route, Router
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode
from grpc_h2.wire.frame_parsing import LONGEST_SHORT_BLOCK
from grpc_h2.wire.hpack import Decoder, Field

_MEMO_ENTRIES: Final = 64
FIELDS_AT_ONCE: Final = 32
"""The number of fields of a long block that are decoded at a time, in some 20 µs."""
_ORDINARY_BLOCKS: Final = 8
"""The number of remembered blocks of an honest client: one for each method that it calls, and some with different
time-outs."""
_BLOCK_WEIGHT: Final = 1024
"""The octets that one remembered block takes, including its route."""
_BLOCK_FACTOR: Final = 4
"""The octets of memory that an unfinished block may take for each of its octets: for the block, a copy, and the decoded
fields."""
_OVERFLOW_GLITCH: Final = 5.0
"""Glitches counted for a header list over the limit, which takes the server milliseconds and the peer little time:
after two hundred such lists, the peer is disconnected."""


class BlockAssembly:
    """An unfinished header block. No other frame may arrive between its frames (RFC 9113 section 6.10)."""

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
        """The block, once its last fragment has arrived and it waits to be decoded."""

    def take(self, kind: int, stream_id: int, fragment: bytes) -> None:
        """Add the next frame.

        Raises:
            ConnectionFault: PROTOCOL_ERROR if it is not a CONTINUATION of this block; ENHANCE_YOUR_CALM if the block
                has too many frames or is too long (VU#421644).
        """
        if kind != frames.CONTINUATION or stream_id != self.stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame inside a header block")
        self._continuations += 1
        if self._continuations > self._limits.max_continuations:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header block in too many CONTINUATION frames")
        self._parts += fragment
        if len(self._parts) > self._limits.max_header_block:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header block too long")

    @property
    def octets(self) -> int:
        """The number of octets of the block that have arrived."""
        return len(self._parts)

    def end(self) -> None:
        """The last fragment has arrived."""
        self.whole = bytes(self._parts)


class Headers:
    """The header blocks that one connection receives: their decoder, the block that is being received, and the memo."""

    __slots__ = (
        "_abuse",
        "_ahead",
        "_decoder",
        "_in_pieces",
        "_limits",
        "_memo_epoch",
        "_reports",
        "_router",
        "assembly",
        "authorized",
        "memo",
        "refuses",
        "router_epoch",
        "timeouts",
    )

    def __init__(self, router: Router, limits: Limits, abuse: Abuse, reports: list[tuple[str, str]]) -> None:
        """``reports``: the list to which reports about the peer for the operator are appended."""
        self._reports = reports
        self.authorized = False
        """Whether a static method has authorized a call of the peer."""
        self._router = router
        self._limits = limits
        self._abuse = abuse
        self._decoder = Decoder(
            max_list_size=limits.max_header_list,
            max_fields=limits.max_header_fields,
            hard_list_size=limits.hard_header_list,
            hard_fields=limits.hard_header_fields,
        )
        self.memo: dict[bytes, Route] = {}
        """Block → route. To be read only."""
        self.timeouts: dict[bytes, float] = {}
        """Block → seconds of its ``grpc-timeout``, for static methods: only a stream that waits needs it. To be read
        only; valid as long as the memo is valid."""
        self.refuses = False
        """Whether a block led to a refusal, so that streams that wait may have to be refused."""
        self._memo_epoch = self._decoder.epoch
        self.router_epoch = router.epoch
        """The router's epoch when the blocks in the memo were authorized."""
        self.assembly: BlockAssembly | None = None
        """The block that is being received or decoded."""
        self._in_pieces = False
        """Whether the block that is being decoded takes several pieces of work."""
        self._ahead: tuple[Field, ...] | None = None
        """The fields of a long block that has been decoded to its end."""

    # -- assembly -------------------------------------------------------------------------------------------------

    def begin(self, stream_id: int, fragment: bytes, *, end_stream: bool, self_dependent: bool, whole: bool) -> None:
        """Begin a block that cannot be decoded at once; ``whole``: this fragment is also its last one."""
        assert self.assembly is None
        self.assembly = BlockAssembly(
            self._limits, stream_id, fragment, end_stream=end_stream, self_dependent=self_dependent
        )
        if whole:
            self.assembly.end()

    def end_assembly(self) -> BlockAssembly | None:
        """Decode more fields of the complete block. Returns the block once all its fields are decoded; `decode` then
        returns them.

        The request of a block that needed several pieces is processed in the next turn, because that work and the last
        piece together would exceed all other work of one turn.
        """
        assembly = self.assembly
        assert assembly is not None
        assert assembly.whole is not None
        if self._ahead is None:
            self._ahead = self._decoder.decode_some(assembly.whole, FIELDS_AT_ONCE)
            self._abuse.spend(FIELDS_AT_ONCE)
            if self._ahead is None:
                self._in_pieces = True
                return None
            if self._in_pieces:
                self._in_pieces = False
                self._abuse.spend(self._limits.work_per_turn)
                return None
        self.assembly = None
        return assembly

    # -- decoding and routing -------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """The router's epoch has changed: drop all remembered blocks, because their authorizations may have changed."""
        self._forget()
        self.router_epoch = self._router.epoch

    def note_refusals(self) -> None:
        """Note that streams that wait may have to be refused."""
        self.refuses = True

    def route(self, block: bytes) -> Route:
        """The route of a request's header block, from the memo or from `learn`."""
        # The memo is not used for a block that has been decoded ahead, because its fields would be taken for those of
        # the next block. It is not used for a long block either, because no long block is remembered, and a look-up of
        # 16 kB takes 3 µs.
        known = self.memo.get(block) if self._ahead is None and len(block) <= LONGEST_SHORT_BLOCK else None
        return known or self.learn(block)

    def learn(self, block: bytes) -> Route:
        """Decode a request's header block and find its route. Remember the block if this is safe.

        Raises:
            ConnectionFault: if the tables of both sides may differ from now on, or the list is far beyond every
                limit.
            StreamFault: if the fields do not form a well-formed request.
        """
        fields = self.decode(block)
        decoder = self._decoder
        if decoder.overflow:
            self._abuse.glitch("header lists beyond the limit", _OVERFLOW_GLITCH)
            too_large = CallFault(StatusCode.RESOURCE_EXHAUSTED, "The request's header list is too large")
            return Route(None, fault=too_large)
        rest, timeout = split_timeout(fields)
        route = self._router.route(rest, decoder.list_size)
        if timeout is not None and route.request is not None:
            seconds = timeout_seconds(timeout)
            if seconds <= 0:
                length = route.request.content_length
                return Route(None, fault=CallFault(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", length))
            if route.method is None:
                return route.with_timeout(seconds)
            if len(self.timeouts) >= _MEMO_ENTRIES:
                self.timeouts.clear()
            self.timeouts[block] = seconds
        if route.refusal is not None:
            self.refuses = True
        if route.authorized:
            self.authorized = True
        elif route.authorized is not None and route.request is not None:
            self._reports.append(("unauthorized", route.request.path))
        sound = not decoder.changed and len(block) <= LONGEST_SHORT_BLOCK
        if sound and route.lasting and route.answer_payload is not None:
            if len(self.memo) >= _MEMO_ENTRIES:
                self.memo.clear()
            self.memo[block] = route
        return route

    def decode(self, block: bytes) -> tuple[Field, ...]:
        """The fields of a whole block. Every block is decoded here, so this is the only place where the table changes
        and the memo must be dropped.

        Raises:
            ConnectionFault: for the same reasons as `learn`.
        """
        decoder = self._decoder
        fields, self._ahead = self._ahead, None
        if fields is None:
            fields = decoder.decode_some(block, maxsize)
            assert fields is not None
        self._abuse.spend(BLOCK_WORK + len(block) // OCTETS_OF_BLOCK_PER_WORK)
        if decoder.epoch != self._memo_epoch:
            self._forget()
            self._memo_epoch = decoder.epoch
        if decoder.beyond_hard_limit:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header list far beyond the limit")
        return fields

    def _forget(self) -> None:
        self.memo.clear()
        if self.timeouts:
            self.timeouts.clear()

    @property
    def held(self) -> int:
        """The octets that are held for the peer's header blocks, beyond the small amount that every connection
        needs."""
        assembly, surplus = self.assembly, len(self.memo) - _ORDINARY_BLOCKS
        octets = 0 if assembly is None else _BLOCK_FACTOR * assembly.octets
        return octets + _BLOCK_WEIGHT * surplus if surplus > 0 else octets

    def check_invariants(self) -> None:
        """Assert that every remembered block was decoded in the table's present state."""
        decoding = self.assembly is not None  # then the memo may be out of date, and is dropped before it is used again
        assert not self.memo or decoding or self._memo_epoch == self._decoder.epoch
        assert len(self.memo) <= _MEMO_ENTRIES
        assert len(self.timeouts) <= _MEMO_ENTRIES
        assert all(len(block) <= LONGEST_SHORT_BLOCK and route.lasting for block, route in self.memo.items())
        assert self._ahead is None or self.assembly is not None
