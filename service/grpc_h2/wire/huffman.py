"""The Huffman code of HPACK (RFC 7541 section 5.2 and appendix B), decoding only, because our own fields are not
Huffman-coded.

The code is a tree of 256 inner nodes. After each octet that it reads, a decoder is at some inner node. The next node,
and the symbols that are passed on the way, depend only on the node and the octet. Each node therefore keeps a row:
octet → (next node, symbols passed). Each step is added at its first use: real traffic needs a few thousand of the
65,536 steps. An attacker can cause all steps; they take 8 MiB, once per process.

A string may be as long as a header block, and a step takes 60 ns, or 2 µs at its first use. So a long string is decoded
one piece at a time (`Run`), and a piece ends early if many of its steps are new. If a text is longer than any use
allows, only its beginning is kept, because joining 100 kB takes longer than any piece.
"""

from __future__ import annotations

from collections.abc import Iterator

from grpc_h2.wire.errors import HpackError

EOS = 256

OCTETS_AT_ONCE = 128
"""The coded octets of one piece, which take some 10 µs."""
_STEPS_AT_ONCE = 16
_NEW_STEPS_AT_ONCE = 8
"""The number of new steps after which a piece ends. They take some 30 µs, and the last `_STEPS_AT_ONCE` may take the
same time."""

# fmt: off
CODE_LENGTHS = (
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
     6, 10, 10, 12, 13,  6,  8, 11, 10, 10,  8, 11,  8,  6,  6,  6,
     5,  5,  5,  6,  6,  6,  6,  6,  6,  6,  7,  8, 15,  6, 12, 10,
    13,  6,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,
     7,  7,  7,  7,  7,  7,  7,  7,  8,  7,  8, 13, 19, 13, 14,  6,
    15,  5,  6,  5,  6,  5,  6,  6,  6,  5,  7,  7,  6,  6,  6,  5,
     6,  7,  6,  5,  5,  6,  7,  7,  7,  7,  7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
)
# fmt: on
"""The number of bits in the code of each octet, and of EOS. The code is canonical (shorter codes first, then by
symbol), so the lengths determine it."""


_steps_known = 0


class _Node(dict[int, tuple["_Node", bytes]]):
    """An inner node of the tree. As a mapping, it holds the steps from this node that were taken before: octet →
    step."""

    __slots__ = ("branches", "may_end")

    def __init__(self) -> None:
        super().__init__()
        self.branches: list[_Node | int] = []
        """The targets of the bits 0 and 1. Each is an inner node or a symbol."""
        self.may_end = False
        """Whether a string may end here: the bits since the last symbol are at most seven, all ones (section 5.2)."""

    def __missing__(self, octet: int) -> tuple[_Node, bytes]:
        node = self
        symbols = bytearray()
        for shift in range(7, -1, -1):
            branch = node.branches[octet >> shift & 1]
            if isinstance(branch, _Node):
                node = branch
            elif branch == EOS:
                # "A Huffman-encoded string literal containing the EOS symbol MUST be treated as a decoding error."
                raise HpackError("Huffman-coded string with EOS in it")
            else:
                symbols.append(branch)
                node = _ROOT
        global _steps_known
        _steps_known += 1
        step = self[octet] = (node, bytes(symbols))
        return step


def _tree() -> _Node:
    """The code tree: level by level, the shortest codes take the leftmost places that are left (canonical code)."""
    root = _Node()
    level = [root]
    for bits in range(1, max(CODE_LENGTHS) + 1):
        symbols: list[_Node | int] = [symbol for symbol, length in enumerate(CODE_LENGTHS) if length == bits]
        inner: list[_Node] = [_Node() for _ in range(2 * len(level) - len(symbols))]
        places: Iterator[_Node | int] = iter([*symbols, *inner])
        for node in level:
            node.branches = [next(places), next(places)]
        level = inner
    node = root
    for _ in range(8):
        node.may_end = True
        last = node.branches[1]
        if isinstance(last, _Node):
            node = last
    return root


_ROOT = _tree()


class Run:
    """The decoding of one long string, one piece at a time."""

    __slots__ = ("_data", "_end", "_keep", "_node", "_pieces", "_position", "length")

    def __init__(self, data: bytes, begin: int, end: int, keep: int) -> None:
        """The string is ``data[begin:end]``. The first ``keep`` octets of its text are kept, and the rest of the piece
        in which they end."""
        self._data = data
        self._end = end
        self._keep = keep
        self._node = _ROOT
        self._pieces: list[bytes] = []
        self._position = begin
        self.length = 0
        """The number of octets of the text that are decoded so far."""

    def step(self) -> bytes | None:
        """Decode the next piece. With the last piece, returns the text, or its beginning as far as it is kept; before
        that, None.

        Raises:
            HpackError: for the same reasons as `decode`.
        """
        data, node, position, last = self._data, self._node, self._position, self._end
        passed: list[bytes] = []
        end, known = min(last, position + OCTETS_AT_ONCE), _steps_known
        while position < end and _steps_known - known < _NEW_STEPS_AT_ONCE:
            for octet in data[position : min(end, position + _STEPS_AT_ONCE)]:
                node, symbols = node[octet]
                passed.append(symbols)
            position += _STEPS_AT_ONCE
        self._node, self._position = node, position
        piece = b"".join(passed)
        if self.length < self._keep:
            self._pieces.append(piece)
        self.length += len(piece)
        if position < last:
            return None
        if not node.may_end:
            raise HpackError("Huffman-coded string with wrong padding")
        return b"".join(self._pieces)


def decode(data: bytes) -> bytes:
    """The octets that ``data`` encodes.

    Raises:
        HpackError: if it contains EOS, or its padding is not at most seven bits of ones (RFC 7541 section 5.2).
    """
    node = _ROOT
    passed = []
    for octet in data:
        node, symbols = node[octet]
        passed.append(symbols)
    if not node.may_end:
        raise HpackError("Huffman-coded string with wrong padding")
    return b"".join(passed)
