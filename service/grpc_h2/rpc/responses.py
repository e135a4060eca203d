"""The header blocks that a server sends: initial metadata, trailers, and the answer to a request that is not gRPC.

They use no dynamic table (see `hpack.encode_block`), so a block means the same on every connection and can be encoded
ahead of time, and two blocks in sequence are one block.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Iterable
from typing import Final, TypeAlias
from urllib.parse import unquote_to_bytes

from grpc_h2.rpc.messages import ENCODINGS
from grpc_h2.rpc.status import StatusCode
from grpc_h2.wire.hpack import ENTRY_OVERHEAD, encode_block, encode_field, encode_integer

Entries: TypeAlias = Iterable[tuple[str, str | bytes]]

MAX_TRAILERS: Final = 8192
"""The size of trailers is below this number of octets, counted as in RFC 9113 section 10.5.1, because grpc-java and
C-core accept no more."""

_SURELY_FITS: Final = 500
"""A message with this number of characters surely fits. Each character may take twelve octets ("%F0%9F%A6%8A"), and the
sum is far below `MAX_TRAILERS`."""
_NAME: Final = re.compile(r"[0-9a-z_.-]+")  # PROTOCOL-HTTP2.md, Header-Name
_VALUE: Final = re.compile(r"[\x20-\x7e]*")  # ibid., ASCII-Value
# Names that describe the exchange itself. A handler that set such a name would contradict the server, or make the
# response malformed.
_OURS: Final = frozenset(
    {"content-length", "content-type", "grpc-accept-encoding", "grpc-encoding", "grpc-message", "grpc-status", "te"}
    | {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"}
)

# PROTOCOL-HTTP2.md, Percent-Byte-Unencoded: 0x20-0x7E without "%".
_PLAIN: Final = re.compile(r"[\x20-\x24\x26-\x7e]*")
_ESCAPES: Final = [
    bytes((octet,)) if 0x20 <= octet <= 0x7E and octet != 0x25 else b"%%%02X" % octet for octet in range(256)
]
_EDGE: Final = re.compile(rb"\A +| +\Z")
_PART_OF_ESCAPE: Final = re.compile(rb"%.?\Z")


def initial_block(metadata: Entries, encoding: str | None) -> bytes:
    """The headers of an answer: 200, content-type, ``grpc-encoding`` if there is one, and a handler's metadata.

    Raises ValueError for metadata that may not be sent.
    """
    block = _HEAD
    if encoding is not None:
        block += encode_block(((b"grpc-encoding", encoding.encode("ascii")), _ACCEPT))
    return block + encode_block(metadata_fields(metadata)) if metadata else block


def trailers_block(status: int, message: str, metadata: Entries = ()) -> bytes:
    """The end of an answer whose headers are already queued. The message is cut so that all fields together stay below
    `MAX_TRAILERS`.

    Raises ValueError for metadata that may not be sent.
    """
    if not status and not message and not metadata:
        return _OK
    return encode_block(_trailers(status, message, metadata, 0))


def trailers_only_block(status: int, message: str, metadata: Entries = ()) -> bytes:
    """A whole answer in one block, for a call that failed before any other frame was sent. Raises ValueError like
    `trailers_block`."""
    if len(message) <= _SURELY_FITS and not metadata and status != StatusCode.UNIMPLEMENTED:
        text = percent_encode(message)
        begin = _FAILED[status] if 0 <= status < len(_FAILED) else _failed(status)
        return begin + _MESSAGE_NAME + encode_integer(len(text), 0x7F, 0x00) + text if text else begin
    if status != StatusCode.UNIMPLEMENTED:
        return _HEAD + encode_block(_trailers(status, message, metadata, _HEAD_SIZE))
    # compression.md: the answer to an unknown encoding names the known ones. In other UNIMPLEMENTED answers the field
    # does no harm.
    fields = _trailers(status, message, metadata, _HEAD_SIZE + _size(*_ACCEPT))
    return _HEAD + encode_block((*fields, _ACCEPT))


def _failed(status: int) -> bytes:
    return _HEAD + encode_field(b"grpc-status", b"%d" % status)


def http_block(status: int, length: int) -> bytes:
    """The headers of a plain answer with a text of ``length`` octets, for clients that do not speak gRPC."""
    fields = [(b":status", b"%d" % status), (b"content-type", b"text/plain"), (b"content-length", b"%d" % length)]
    if status == 405:  # RFC 9110 section 15.5.6: "The origin server MUST generate an Allow header field"
        fields.append((b"allow", b"POST"))
    return encode_block(tuple(fields))


def percent_encode(message: str) -> bytes:
    """``message`` as the value of ``grpc-message``: UTF-8, with %XX for all octets but printable ASCII.

    Spaces at the ends are escaped too: a field value with them is malformed (RFC 9113 section 8.2.1), and every reader
    of the message unescapes them. A lone surrogate, which has no form in UTF-8, becomes "?".
    """
    octets = message.encode("utf-8", "replace")
    if _PLAIN.fullmatch(message) is None:
        octets = b"".join([_ESCAPES[octet] for octet in octets])
    if octets[:1] == b" " or octets[-1:] == b" ":
        octets = _EDGE.sub(lambda spaces: b"%20" * len(spaces[0]), octets)
    return octets


def metadata_fields(metadata: Entries) -> tuple[tuple[bytes, bytes], ...]:
    """Metadata as fields: the values of ``-bin`` names in base64 without padding, others stripped of outer spaces.

    Raises ValueError for a name that is not in lower case or that only the server may send, and for text beyond
    printable ASCII. Such a mistake of a handler must not become a malformed response (or, with CR and LF, a response
    that a proxy splits).
    """
    return tuple([_field(name, value) for name, value in metadata])


def _field(name: str, value: str | bytes) -> tuple[bytes, bytes]:
    if _NAME.fullmatch(name) is None or name in _OURS:
        raise ValueError(f"metadata key may not be sent: {name!r}")
    if name.endswith("-bin"):
        octets = value.encode() if isinstance(value, str) else value
        return name.encode(), b2a_base64(octets, newline=False).rstrip(b"=")
    text = value if isinstance(value, str) else value.decode("latin-1")
    if _VALUE.fullmatch(text) is None:
        raise ValueError(f"metadata value of {name!r} is not printable ASCII")
    return name.encode(), text.strip(" ").encode()


def _trailers(status: int, message: str, metadata: Entries, taken: int) -> tuple[tuple[bytes, bytes], ...]:
    """The fields of trailers. The sum of their size and ``taken``, the size of other fields, is less than
    `MAX_TRAILERS`."""
    first = (b"grpc-status", b"%d" % status)
    rest = metadata_fields(metadata)
    if not message:
        return (first, *rest)
    taken += _size(*first) + sum(_size(name, value) for name, value in rest) + _size(b"grpc-message", b"")
    text = _fit(message, MAX_TRAILERS - 1 - taken)
    return (first, (b"grpc-message", text), *rest) if text else (first, *rest)


def _fit(message: str, room: int) -> bytes:
    """Apply `percent_encode` to as many whole characters of ``message`` as fit in ``room`` octets."""
    if room <= 0:
        return b""
    encoded = percent_encode(message[: room + 1])  # each character takes at least one octet
    if len(encoded) <= room:
        return encoded
    cut = _PART_OF_ESCAPE.sub(b"", encoded[:room])
    # Decoding drops a character whose last octets were cut off. Spaces at the end would have to be escaped, which takes
    # more octets, so they are removed.
    return percent_encode(unquote_to_bytes(cut).decode("utf-8", "ignore").rstrip(" "))


def _size(name: bytes, value: bytes) -> int:
    return len(name) + len(value) + ENTRY_OVERHEAD


_ACCEPT: Final = (b"grpc-accept-encoding", ", ".join(ENCODINGS).encode())
_HEAD_FIELDS: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_HEAD: Final = encode_block(_HEAD_FIELDS)
_MESSAGE_NAME: Final = encode_field(b"grpc-message", b"")[:-1]
"""The beginning of the encoded field ``grpc-message``, up to the length of its value."""
_FAILED: Final = tuple([_failed(int(status)) for status in StatusCode])
"""The beginning of a Trailers-Only answer for each status. A tuple, because an `IntEnum` takes long to hash as a
key."""
_HEAD_SIZE: Final = sum(_size(name, value) for name, value in _HEAD_FIELDS)
_OK: Final = encode_block(((b"grpc-status", b"0"),))
