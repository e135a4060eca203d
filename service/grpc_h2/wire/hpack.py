"""HPACK (RFC 7541): a complete decoder, and an encoder that keeps no state.

**Decoder.** The static and the dynamic table are one list, indexed as on the wire: 0 is no field, 1 to 61 are the
static fields, 62 is the newest dynamic field. A connection whose peer has inserted no entry shares the static list with
all other connections: ten thousand idle connections hold no table of their own. An entry carries its size (name + value
+ 32, section 4.1), so neither eviction nor the limit on the list has to add up lengths again. Fields are immutable
tuples, shared by the table, by all lists that contain them and by the memo of decoded blocks.

*Both tables must stay equal.* Every block is decoded to its end; if a list is too long, only its beginning is kept. The
only exceptions are `HpackError` and a list beyond a hard limit, after which the connection must end (RFC 9113 section
4.3). Every change of the table, even if the entries remain the same, increments `Decoder.epoch`: a remembered block is
valid for the epoch in which it was decoded, and only if decoding it did not change the epoch.

**Pieces.** `Decoder.decode_some` returns after a bounded amount of work: a number of fields, of octets, or a piece of
a long Huffman-coded string. Such a string is decoded before its field; until then the field waits and has no effect.

**Huffman memo.** The meaning of a Huffman-coded string depends only on its octets, so the last one or two thousand
strings are remembered for all connections: names, and time-outs that recur within milliseconds. Two generations bound
the memo to about half a megabyte. A field marked "never indexed" (section 7.1.3: its sender protects its secrecy) is
not remembered.

**Encoder.** It uses static indices and literals without indexing, so the octets of a field do not depend on earlier
fields, and answers can be encoded beforehand. Fields are not Huffman-coded, because coding would cost more time than
the saved octets are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from sys import maxsize

from grpc_h2.wire import huffman
from grpc_h2.wire.errors import HpackError
from grpc_h2.wire.generations import TwoGenerations
from grpc_h2.wire.static_table import STATIC_INDICES, STATIC_NAMES, STATIC_TABLE

Field = tuple[bytes, bytes]
_Entry = tuple[Field, int]

ENTRY_OVERHEAD = 32
"""The octets that an entry counts in addition to name and value (section 4.1)."""

DEFAULT_TABLE_SIZE = 4096
"""SETTINGS_HEADER_TABLE_SIZE before any SETTINGS (RFC 9113 section 6.5.2)."""

MAX_CONTINUATION_OCTETS = 5
"""The most octets of an integer after its prefix: five octets hold 35 bits. CVE-2023-33953 was an integer of unlimited
length."""

MAX_INTEGER = 2**32

_FIRST_DYNAMIC = len(STATIC_TABLE) + 1

_STATIC: list[_Entry] = [
    (field, len(field[0]) + len(field[1]) + ENTRY_OVERHEAD) for field in ((b"", b""), *STATIC_TABLE)
]
"""The table of a connection without dynamic entries. All connections share it, so it is never changed."""


def decode_integer(block: bytes, position: int, prefix: int) -> tuple[int, int]:
    """The integer (section 5.1) whose prefix was all ones (``prefix``) and whose next octet is at ``position``.

    Returns:
        The value, and the position after it.

    Raises:
        HpackError: if the block ends before the integer does, or the integer has more than five octets or is above
            2^32.
    """
    if position < len(block) and block[position] < 0x80:  # two octets in all, as in most cases
        return prefix + block[position], position + 1
    value = prefix
    shift = 0
    for octet in block[position : position + MAX_CONTINUATION_OCTETS]:
        value += (octet & 0x7F) << shift
        position += 1
        if octet < 0x80:
            if value > MAX_INTEGER:
                break
            return value, position
        shift += 7
    raise HpackError("integer too large, too long or cut short")


_REMEMBERED_STRINGS = 1024
_LONGEST_REMEMBERED_STRING = 64
"""The most octets of a coded string that is remembered. Longer strings rarely occur twice, except in blocks that are
remembered whole."""


class _HuffmanMemo(TwoGenerations[bytes, bytes]):
    """Huffman-coded string → octets."""

    __slots__ = ()

    def __missing__(self, coded: bytes) -> bytes:
        text = self.recall(coded)
        if text is None:
            text = huffman.decode(coded)
            if len(coded) > _LONGEST_REMEMBERED_STRING:
                return text
        self.remember(coded, text)
        return text


_remembered = _HuffmanMemo(_REMEMBERED_STRINGS).__getitem__


_OCTETS_AT_ONCE = huffman.OCTETS_AT_ONCE
"""The octets of a block after which a call of `Decoder.decode_some` with a limit of fields stops. It stops at the end
of a field."""
_LONGEST_WHOLE_STRING = 384
"""The most coded octets of a string that is decoded in one piece. A block that is decoded in one piece may have the
same length."""


class _LongString(Exception):
    """A Huffman-coded string, ``block[position:end]``, that is decoded one piece at a time (`_LongStrings`)."""

    def __init__(self, position: int, end: int) -> None:
        self.position = position
        self.end = end


def _string(block: bytes, position: int, secret: bool) -> tuple[bytes, int]:
    """The string literal (section 5.2) at ``position``, and the position after it.

    ``secret``: whether the string must not be remembered.

    Raises:
        _LongString: for a coded string of more than `_LONGEST_WHOLE_STRING` octets.
    """
    try:
        octet = block[position]
    except IndexError:
        raise HpackError("block ends where a string should be") from None
    position += 1
    if octet < 0x7F:  # short and plain, like most strings
        end = position + octet
        if end > len(block):
            raise HpackError("string longer than its block")
        return block[position:end], end
    length = octet & 0x7F
    if length == 0x7F:
        length, position = decode_integer(block, position, 0x7F)
    end = position + length
    # The length is checked before any octet is copied, because it may be four gigabytes.
    if end > len(block):
        raise HpackError("string longer than its block")
    if octet < 0x80:
        return block[position:end], end
    if length > _LONGEST_WHOLE_STRING:
        raise _LongString(position, end)
    data = block[position:end]
    return (huffman.decode(data) if secret else _remembered(data)), end


_StringReader = Callable[[bytes, int, bool], tuple[bytes, int]]


class _LongStrings:
    """The long strings of one field: its name, its value, or both."""

    __slots__ = ("_keep", "_run", "_texts", "left_out")

    def __init__(self, keep: int) -> None:
        """``keep``: the most octets of a text that are kept."""
        self._keep = keep
        self._run: tuple[int, huffman.Run] | None = None
        self._texts: dict[int, bytes] = {}
        self.left_out = 0
        """The number of octets that were not kept."""

    def begin(self, block: bytes, string: _LongString) -> None:
        """Add another string of ``block`` that is to be decoded."""
        self._run = string.position, huffman.Run(block, string.position, string.end, self._keep)

    def advance(self) -> bool:
        """Decode a piece. Returns whether it was the last piece of the string."""
        assert self._run is not None
        position, run = self._run
        text = run.step()
        if text is None:
            return False
        self._run = None
        self._texts[position] = text
        self.left_out += run.length - len(text)
        return True

    def string(self, block: bytes, position: int, secret: bool) -> tuple[bytes, int]:
        """Like `_string`, but if long strings have been decoded, returns them instead of raising `_LongString`."""
        try:
            return _string(block, position, secret)
        except _LongString as long:
            text = self._texts.get(long.position)
            if text is None:
                raise
            return text, long.end


class Decoder:
    """Decodes the header blocks of one connection, in their order."""

    __slots__ = (
        "_allowed",
        "_capacity",
        "_hard_fields",
        "_hard_list_size",
        "_long_strings",
        "_max_fields",
        "_max_list_size",
        "_suspended",
        "_table",
        "_used",
        "beyond_hard_limit",
        "changed",
        "epoch",
        "list_size",
        "overflow",
    )

    def __init__(
        self,
        *,
        max_list_size: int,
        max_fields: int,
        max_table_size: int = DEFAULT_TABLE_SIZE,
        hard_list_size: float = inf,
        hard_fields: int = maxsize - 1,
    ) -> None:
        """
        Args:
            max_list_size: octets of a field list, each field counted as name + value + 32.
            max_fields: fields of a list.
            max_table_size: our SETTINGS_HEADER_TABLE_SIZE as the peer knows it.
            hard_list_size: octets of a field list beyond which a block is not decoded any further. The table then
                differs from the peer's, so the connection must end; ``beyond_hard_limit`` is then true.
            hard_fields: the number of fields beyond which a block is not decoded any further.
        """
        self._max_list_size = max_list_size
        self._max_fields = max_fields
        self._hard_list_size = hard_list_size
        self._hard_fields = hard_fields
        self._suspended: tuple[list[Field], int, int, int] | None = None
        self._long_strings: _LongStrings | None = None
        """The long strings of the field that waits for them."""
        self._allowed = max_table_size
        self._capacity = max_table_size
        self._used = 0
        self._table = _STATIC
        self.epoch = 0
        """A number that grows with every change of the dynamic table: an insertion, even of an entry that is too large
        to stay, an eviction, and a size update, even to the same size."""
        self.changed = False
        """Whether the last block moved ``epoch``; decoding it again would then give another result."""
        self.overflow = False
        """Whether the last block's list exceeded a limit and was therefore cut."""
        self.list_size = 0
        """Octets of the whole list that the last block encodes, including the fields that were left out. Beyond a hard
        limit: octets of the fields that were decoded."""
        self.beyond_hard_limit = False
        """Whether the last block was not decoded to its end; then this decoder must not be used again."""

    @property
    def dynamic_table(self) -> tuple[Field, ...]:
        """The dynamic entries, the newest first."""
        return tuple(field for field, _ in self._table[_FIRST_DYNAMIC:])

    @property
    def dynamic_table_size(self) -> int:
        """Octets of the dynamic entries (section 4.1)."""
        return self._used

    def set_max_table_size(self, size: int) -> None:
        """The peer has acknowledged our SETTINGS_HEADER_TABLE_SIZE. If the peer had chosen more, its next block must
        begin with a size update (section 4.2)."""
        self._allowed = size
        self.epoch += 1

    def decode(self, block: bytes) -> tuple[Field, ...]:
        """The fields of one whole header block (section 3.2), without those beyond a limit: see ``overflow``.

        Raises `HpackError` as `decode_some` does.
        """
        fields = self.decode_some(block, maxsize)
        assert fields is not None
        return fields

    def decode_some(self, block: bytes, most: int) -> tuple[Field, ...] | None:
        """Decode up to ``most`` of the next fields of ``block``. Returns all fields, as `decode` does, once the whole
        block is decoded. Until then the result is None, and no other block may be decoded. With a ``most`` below
        `maxsize`, the octets of one call are also bounded.

        This function is flat, and longer than functions should be. It decodes each block that is not remembered, such
        as that of a call with a fresh deadline, and a function call for each field would make every such call slower.

        Raises:
            HpackError: if the block is not HPACK, or refers to entries that do not exist. The table may then differ
                from the peer's, so this decoder must not be used again.
        """
        if self._suspended is None:
            self.changed = False
            if self._capacity > self._allowed and (not block or block[0] & 0xE0 != 0x20):
                raise HpackError("no size update after the table was made smaller")
            fields: list[Field] = []
            position = total = 0
            left = self._hard_fields + 1
        else:
            fields, position, total, left = self._suspended
            self._suspended = None
        if self._long_strings is not None and not self._long_strings.advance():
            self._suspended = fields, position, total, left
            return None
        table = self._table
        limit = self._max_list_size
        end = len(block)
        until = end if most == maxsize else min(end, position + _OCTETS_AT_ONCE)
        for done in range(min(most, left)):
            if position >= until:
                if position >= end:
                    break
                self._suspended = fields, position, total, left - done
                return None
            octet = block[position]
            position += 1
            if octet > 0x80:  # 1xxxxxxx: an entry (section 6.1)
                index = octet & 0x7F
                if index == 0x7F:
                    index, position = decode_integer(block, position, 0x7F)
                try:
                    field, size = table[index]
                except IndexError:
                    raise HpackError("index beyond the table") from None
            elif 0x20 <= octet < 0x40:  # 001xxxxx: size of the dynamic table (section 6.3)
                # Every field counts at least 32 octets, so a sum of 0 means that no field precedes the update.
                if total:
                    raise HpackError("size update after a field")
                position = self._resize(block, position, octet & 0x1F)
                table = self._table
                continue
            else:
                try:
                    field, size, position = self._literal(block, position, octet)
                except _LongString:
                    literal = self._long_literal(block, position, octet, whole=most == maxsize)
                    if literal is None:
                        self._suspended = fields, position - 1, total, left - done
                        return None
                    field, size, position = literal
                if octet >= 0x40:
                    self._insert(field, size)
                    table = self._table
            total += size
            # Each field counts at least 32 octets, so this limit bounds memory; the number of fields is checked at the
            # end.
            if total <= limit:
                fields.append(field)
            elif total > self._hard_list_size:
                self.beyond_hard_limit = True
                break
        else:
            if most < left:
                self._suspended = fields, position, total, left - most
                return None
            self.beyond_hard_limit = True
        self.list_size = total
        self.overflow = total > limit
        if len(fields) > self._max_fields:
            self.overflow = True
            del fields[self._max_fields :]
        return tuple(fields)

    def _literal(
        self, block: bytes, position: int, octet: int, string: _StringReader = _string
    ) -> tuple[Field, int, int]:
        """A literal (section 6.2) that began with ``octet``, its size, and the position after it."""
        prefix = 0x3F if octet >= 0x40 else 0x0F
        secret = octet & 0xF0 == 0x10
        index = octet & prefix
        if index:
            if index == prefix:
                index, position = decode_integer(block, position, prefix)
            try:
                name = self._table[index][0][0]
            except IndexError:
                raise HpackError("index beyond the table") from None
        elif octet == 0x80:  # an indexed field with index 0 also leads here
            raise HpackError("index 0")
        else:
            name, position = string(block, position, secret)
        value, position = string(block, position, secret)
        return (name, value), len(name) + len(value) + ENTRY_OVERHEAD, position

    def _long_literal(self, block: bytes, position: int, octet: int, *, whole: bool) -> tuple[Field, int, int] | None:
        """Like `_literal`, for a field with long strings. Returns None while one of the strings is being decoded, but
        never with ``whole``."""
        if self._long_strings is None:
            # The part of a text that is not kept does not fit into any list or table.
            self._long_strings = _LongStrings(max(self._max_list_size, self._capacity, self._allowed))
        strings = self._long_strings
        while True:
            try:
                literal = self._literal(block, position, octet, strings.string)
            except _LongString as string:
                strings.begin(block, string)
                if not whole:
                    return None
                while not strings.advance():
                    pass
            else:
                self._long_strings = None
                field, size, position = literal
                return field, size + strings.left_out, position

    def _resize(self, block: bytes, position: int, size: int) -> int:
        """Applies a size update whose prefix is ``size``. Returns the position after it."""
        if size == 0x1F:
            size, position = decode_integer(block, position, 0x1F)
        if size > self._allowed:
            raise HpackError("size update beyond our limit")
        self._capacity = size
        self._evict(size)
        self.epoch += 1
        self.changed = True
        return position

    def _insert(self, field: Field, size: int) -> None:
        """Adds an entry, and evicts the oldest ones to make room (section 4.4)."""
        self.epoch += 1
        self.changed = True
        if size > self._capacity:
            # "It is not an error to attempt to add an entry that is larger than the maximum size; [it] causes the
            # table to be emptied".
            self._evict(0)
            return
        if self._used + size > self._capacity:
            self._evict(self._capacity - size)
        table = self._table
        if table is _STATIC:
            table = self._table = _STATIC.copy()
        table.insert(_FIRST_DYNAMIC, (field, size))
        self._used += size

    def _evict(self, target: int) -> None:
        """Drops the oldest entries until the rest is at most ``target`` octets."""
        if target <= 0:
            self._table = _STATIC
            self._used = 0
            return
        table = self._table
        while self._used > target:
            self._used -= table.pop()[1]


def encode_integer(value: int, prefix: int, pattern: int) -> bytes:
    """``value`` as an integer (section 5.1) in the low bits that ``prefix`` masks; ``pattern``: the high bits."""
    if value < prefix:
        return bytes((pattern | value,))
    octets = bytearray((pattern | prefix,))
    value -= prefix
    while value >= 0x80:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def encode_size_update(size: int) -> bytes:
    """A dynamic table size update (section 6.3), which belongs at the beginning of a block."""
    return encode_integer(size, 0x1F, 0x20)


def encode_field(name: bytes, value: bytes) -> bytes:
    """One field: a static index, or a literal without indexing (section 6.2.2). The name of a literal has a static
    index if there is one.

    ``name`` must be in lower case. Name and value are not checked.
    """
    index = STATIC_INDICES.get((name, value))
    if index is not None:
        return bytes((0x80 | index,))
    index = STATIC_NAMES.get(name, 0)
    head = encode_integer(index, 0x0F, 0x00)
    if not index:
        head += encode_integer(len(name), 0x7F, 0x00) + name
    return head + encode_integer(len(value), 0x7F, 0x00) + value


def encode_block(fields: Iterable[Field]) -> bytes:
    """A header block of these fields. It does not depend on the connection or on earlier blocks: see `encode_field`."""
    return b"".join([encode_field(name, value) for name, value in fields])
