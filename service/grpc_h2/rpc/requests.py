"""Judges a request's header list: whether it is well formed, whether it is gRPC, and which metadata the handler gets.

Theory of operation. A list is judged by three criteria. If the list violates several criteria, the first of them
decides the answer, whatever the order of the fields:

1. its shape (RFC 9113 sections 8.1 to 8.3): `StreamFault`, because a malformed request must not be answered at all;
2. whether it is gRPC: `HttpFault` 405 or 415, because other clients understand only an HTTP status;
3. whether the call makes sense (PROTOCOL-HTTP2.md): `CallFault` with a ``grpc-status``.

The meaning of a field depends only on its own octets, so `_read` judges each field alone, once, and a bounded memo
keeps the verdict; `interpret` makes one pass and only counts, orders and collects. That pass also finds faults that
concern several fields (a field that is repeated, too late or missing). `split_timeout` removes the one field that
differs from call to call, so that the caller can remember the verdict on all other fields.
"""

from __future__ import annotations

import re
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

from grpc_h2.rpc.faults import CallFault, HttpFault
from grpc_h2.rpc.status import StatusCode
from grpc_h2.wire.errors import ErrorCode, StreamFault
from grpc_h2.wire.hpack import Field

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

_UNREADABLE: Final = StatusCode.INTERNAL  # the answer of C-core to metadata that it cannot read

# RFC 9113 section 8.2.1 forbids upper case, controls, spaces and characters beyond ASCII, and allows a colon only at
# the beginning, in pseudo-headers. This expression is narrower: it accepts only a token, as RFC 9110 section 5.1
# demands.
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
# "A field value MUST NOT contain the zero value (0x00), line feed (0x0a), or carriage return (0x0d) at any position",
# nor "start or end with an ASCII whitespace character (0x20 or 0x09)".
# Checked by `bytes.translate` and `bytes.strip`, because a regular expression takes 0.1 ms for 4 kB.
_NEVER_IN_A_VALUE: Final = b"\0\r\n"
_NOT_AT_AN_END: Final = b" \t"
_TIMEOUT: Final = re.compile(rb"[0-9]{1,8}[HMSmun]")
# The media type, alone or followed by a format ("+proto") or a parameter (";"); application/grpc-web is another
# protocol.
_GRPC_CONTENT: Final = re.compile(rb"application/grpc(?:[+;].*)?", re.IGNORECASE | re.DOTALL)

_MULTIPLES: Final = {ord("H"): 3600, ord("M"): 60, ord("S"): 1}
_FRACTIONS: Final = {ord("m"): 1_000, ord("u"): 1_000_000, ord("n"): 1_000_000_000}

_MOST_LENGTH_DIGITS: Final = 18  # of content-length; 10^18 octets are an exabyte, and int() of 16 KiB digits is slow
_MOST_BINARY_VALUES: Final = 100  # values in one -bin field: as many as fields, so that commas do not multiply memory

# The kinds of fields. The pseudo-headers are first, so that one comparison distinguishes them from the other kinds.
_METHOD, _SCHEME, _PATH, _AUTHORITY = range(4)
(
    _HIDDEN,  # well formed, but a handler does not need it
    _METADATA,  # the meaning is a tuple of metadata entries
    _TIMEOUT_FIELD,
    _ENCODING,
    _ACCEPT,
    _CONTENT_TYPE,
    _CONTENT_LENGTH,
    _HOST,
    _CALL_FAULT,  # the meaning is (grpc-status, message)
) = range(4, 13)

_KINDS: Final[dict[bytes, int]] = {
    b":method": _METHOD,
    b":scheme": _SCHEME,
    b":path": _PATH,
    b":authority": _AUTHORITY,
    b"grpc-timeout": _TIMEOUT_FIELD,
    b"grpc-encoding": _ENCODING,
    b"grpc-accept-encoding": _ACCEPT,
    b"content-type": _CONTENT_TYPE,
    b"content-length": _CONTENT_LENGTH,
    b"host": _HOST,
    # Fields that C-core removes from the metadata of a servicer (observed with grpcio 1.85). It leaves other names that
    # begin with "grpc-", and so do we, because grpc-previous-rpc-attempts is useful to a handler.
    b"te": _HIDDEN,
    b"grpc-internal-encoding-request": _HIDDEN,
    b"grpc-message": _HIDDEN,
    b"grpc-status": _HIDDEN,
    b"grpc-tags-bin": _HIDDEN,
    b"grpc-trace-bin": _HIDDEN,
    b"grpc-server-stats-bin": _HIDDEN,
    b"grpclb_client_stats": _HIDDEN,
    b"endpoint-load-metrics-bin": _HIDDEN,
    b"lb-cost-bin": _HIDDEN,
    b"x-envoy-peer-metadata": _HIDDEN,
}
# RFC 9113 section 8.2.2: "An endpoint MUST NOT generate an HTTP/2 message containing connection-specific header
# fields".
_CONNECTION_SPECIFIC: Final = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)


@dataclass(frozen=True, slots=True)
class Request:
    """A call as its headers describe it."""

    path: str
    """``/package.Service/Method``, exactly as it was sent: case-sensitive, neither normalised nor unescaped."""
    authority: str
    """The value of ``:authority``, otherwise of ``host``; empty without both."""
    metadata: Metadata
    """The metadata for a servicer, in the order received; the values of names that end in ``-bin`` are decoded."""
    timeout: float | None
    """Seconds from the arrival of the headers; 0.0: it has expired already; None: there is no deadline."""
    encoding: str
    """How messages with the compressed flag are compressed; "identity" if the request names no encoding."""
    accepts: tuple[str, ...]
    """The encodings that the client accepts in answers."""
    content_length: int | None
    """The octets of all DATA, if the request announced them."""
    content_type: str

    def with_timeout(self, timeout: float | None) -> Request:
        """The same call with another timeout, in seconds."""
        return Request(
            self.path,
            self.authority,
            self.metadata,
            timeout,
            self.encoding,
            self.accepts,
            self.content_length,
            self.content_type,
        )


# The verdicts of `_read` on well-formed fields. When the memo is full, it is emptied. So a hit needs no bookkeeping; if
# an attacker fills the memo, other clients lose a few microseconds. Worst case 1024 x (512 octets, twice) = 1 MiB.
_verdicts: dict[Field, tuple[int, Any]] = {}
_MOST_VERDICTS: Final = 1024
_LONGEST_REMEMBERED: Final = 512
_LONGEST_LOGGED: Final = 64
"""The most octets of a field's name in the log."""


def interpret(fields: tuple[Field, ...]) -> Request:
    """Judge the header list of a request.

    Raises `StreamFault` if the list is malformed (RFC 9113 sections 8.1.1, 8.2 and 8.3); otherwise `HttpFault` if it is
    not gRPC; otherwise `CallFault` if the call cannot be understood. The latter two carry ``content_length``, because
    the length of the body is judged before the answer is sent.
    """
    # One pass with local variables, because this function runs for every call whose list is not remembered (see the
    # module's docstring).
    pseudo: list[Any] = [None, None, None, None]
    metadata: list[tuple[str, str | bytes]] = []
    regular = False
    timeout = length = host = fault = content_type = None
    accepts: tuple[str, ...] = ()
    encoding, is_grpc = "identity", True
    for field in fields:
        kind, meaning = _verdicts.get(field) or _read(field)
        if kind <= _AUTHORITY:
            # Section 8.3: pseudo-headers precede all regular fields, and "the same pseudo-header field name MUST NOT
            # appear more than once".
            if regular or pseudo[kind] is not None:
                _malformed("a pseudo-header twice, or behind a regular field")
            pseudo[kind] = meaning
            continue
        regular = True
        if kind == _METADATA:
            metadata += meaning
        elif kind == _TIMEOUT_FIELD:
            timeout = meaning  # the last value is used, as in C-core
        elif kind == _CONTENT_TYPE:
            content_type, acceptable = meaning
            is_grpc = is_grpc and acceptable
        elif kind == _ACCEPT:
            accepts += meaning
        elif kind == _ENCODING:
            encoding = meaning
        elif kind == _CONTENT_LENGTH:
            if length is not None and length != meaning:
                _malformed("content-length twice, and not the same")
            length = meaning
            metadata.append(("content-length", field[1].decode()))
        elif kind == _HOST:
            if host is not None:
                fault = fault or (_UNREADABLE, "more than one host")
            host = meaning
            metadata.append(("host", meaning))
        elif kind == _CALL_FAULT:
            fault = fault or meaning
    method, scheme, path, authority = pseudo
    if method is None or scheme is None or path is None:
        _malformed("a request lacks :method, :scheme or :path")
    if method != "POST":
        raise HttpFault(405, f"gRPC is spoken with POST, not with {method[:32]!a}\n", length)
    if content_type is None or not is_grpc:
        raise HttpFault(415, "the content-type of gRPC is application/grpc\n", length)
    # The path is checked before it is used (CVE-2026-33186: "svc/Method" passed rules that were written for
    # "/svc/Method").
    if path[:1] != "/":
        fault = (StatusCode.UNIMPLEMENTED, "a path is UTF-8 and begins with '/'")
    if fault is not None:
        raise CallFault(fault[0], fault[1], length)
    return Request(
        path,
        authority or host or "",
        tuple(metadata),
        timeout,
        encoding,
        accepts or ("identity",),
        length,
        content_type,
    )


def split_timeout(fields: tuple[Field, ...]) -> tuple[tuple[Field, ...], bytes | None]:
    """Separate the list from its ``grpc-timeout``, so that the verdict on the other fields can be remembered.

    Returns ``rest, value``. If ``value`` is not None, it is well formed, and ``interpret(fields)`` equals
    ``interpret(rest)`` with the timeout ``parse_timeout(value)``, or fails as ``interpret(rest)`` does. A timeout that
    could change the verdict on the other fields stays in the list, and ``value`` is None. Raises nothing.
    """
    for index in range(len(fields) - 1, -1, -1):  # from the end: clients write it late, and the last one is used
        name, value = fields[index]
        if name == b"grpc-timeout":
            # If a pseudo-header follows directly, only the timeout makes the list malformed, so the timeout must stay
            # in it.
            late = index + 1 < len(fields) and fields[index + 1][0][:1] == b":"
            if late or _TIMEOUT.fullmatch(value) is None:
                break
            return fields[:index] + fields[index + 1 :], value
    return fields, None


def parse_timeout(value: bytes) -> float:
    """The seconds of a ``grpc-timeout``: up to eight digits and a unit; 0.0 means that it has expired already.

    Raises `CallFault` for any other text.
    """
    if _TIMEOUT.fullmatch(value) is None:
        raise CallFault(_UNREADABLE, f"not a grpc-timeout: {value[:32]!a}")
    return timeout_seconds(value)


def timeout_seconds(value: bytes) -> float:
    """Like `parse_timeout`, for a ``value`` that is known to be well formed, such as a value from `split_timeout`."""
    amount, unit = int(value[:-1]), value[-1]
    # Division gives the nearest float; multiplication by 1e-3 does not.
    return float(amount * _MULTIPLES[unit]) if unit in _MULTIPLES else amount / _FRACTIONS[unit]


def check_trailers(fields: tuple[Field, ...]) -> None:
    """Judge the trailers of a request. Their content is not used.

    Raises `StreamFault` if a name or a value is malformed, or if trailers may not have a field (RFC 9113 section 8.1:
    "Trailers MUST NOT include pseudo-header fields").
    """
    for field in fields:
        if (_verdicts.get(field) or _read(field))[0] <= _AUTHORITY:
            _malformed("a pseudo-header in trailers")


def _read(field: Field) -> tuple[int, Any]:
    """The kind and the meaning of one field. Raises `StreamFault` if the field itself is malformed."""
    name, value = field
    kind = _KINDS.get(name)
    if len(value.strip(_NOT_AT_AN_END).translate(None, _NEVER_IN_A_VALUE)) != len(value):
        _malformed(f"a field value with NUL, CR, LF or space at an end{_of_field(name)}")
    if kind is None:
        if _NAME.fullmatch(name) is None:
            _malformed("not a field name of a request")
        if name in _CONNECTION_SPECIFIC:
            _malformed(f"a connection-specific field{_of_field(name)}")
        verdict = _read_binary(name, value) if name.endswith(b"-bin") else _metadata_text(name, value)
    else:
        verdict = _read_known(kind, name, value)
    # Calls of grpc-go and grpc-java have a new timeout every time. If timeouts were remembered, they would only
    # displace other fields.
    if len(name) + len(value) <= _LONGEST_REMEMBERED and verdict[0] not in (_CALL_FAULT, _TIMEOUT_FIELD):
        if len(_verdicts) >= _MOST_VERDICTS:
            _verdicts.clear()
        _verdicts[field] = verdict
    return verdict


def _read_known(kind: int, name: bytes, value: bytes) -> tuple[int, Any]:
    meaning: Any = None
    if kind == _PATH:
        return _read_path(value)
    if kind <= _AUTHORITY:
        # An empty authority is treated like a missing one: "host" may still name an authority.
        meaning = _text(value) if value or kind == _AUTHORITY else _malformed("an empty pseudo-header")
    elif kind == _TIMEOUT_FIELD:
        try:
            meaning = parse_timeout(value)
        except CallFault as fault:
            return _CALL_FAULT, (fault.status, fault.message)
    elif kind == _CONTENT_TYPE:
        meaning = _text(value), _GRPC_CONTENT.fullmatch(value) is not None
    elif kind == _CONTENT_LENGTH:
        if not value.isdigit() or len(value) > _MOST_LENGTH_DIGITS:
            _malformed("content-length is not a number")
        meaning = int(value)
    elif kind == _ACCEPT:
        meaning = tuple(_text(part.strip()) for part in value.split(b",") if part.strip())
    elif kind in (_ENCODING, _HOST):
        meaning = _text(value)
    elif name == b"te" and value.lower() != b"trailers":
        # Section 8.2.2: "it MUST NOT contain any value other than 'trailers'".
        _malformed("te is not trailers")
    return kind, meaning


def _read_path(value: bytes) -> tuple[int, Any]:
    if not value:
        _malformed("an empty pseudo-header")
    try:
        return _PATH, value.decode()
    except UnicodeDecodeError:
        # No method has a name that is not ASCII, and lenient decoding would map two different paths to the same name.
        return _PATH, ""


def _read_binary(name: bytes, value: bytes) -> tuple[int, Any]:
    """The values of a ``-bin`` field: base64 with or without padding, several of them joined by commas."""
    parts = value.split(b",", _MOST_BINARY_VALUES)
    if len(parts) > _MOST_BINARY_VALUES:
        return _CALL_FAULT, (StatusCode.RESOURCE_EXHAUSTED, f"too many values in {name.decode()}")
    key, entries = name.decode(), []
    for part in parts:
        digits = part.strip(b" \t").rstrip(b"=")
        try:
            decoded = a2b_base64(digits + b"=" * (-len(digits) % 4))
        except Base64Error:
            decoded = b""
        # The decoder skips characters that are not base64. Encoding the result again detects such characters, and also
        # bits beyond the last octet.
        if b2a_base64(decoded, newline=False).rstrip(b"=") != digits:
            return _CALL_FAULT, (_UNREADABLE, f"not base64: {key}")
        entries.append((key, decoded))
    return _METADATA, tuple(entries)


def _metadata_text(name: bytes, value: bytes) -> tuple[int, Any]:
    return _METADATA, ((name.decode(), _text(value)),)


def _text(value: bytes) -> str:
    """The text as grpcio shows it: UTF-8, or Latin-1 if it is not valid UTF-8. Never fails."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _of_field(name: bytes) -> str:
    """The name of the field that is at fault, for the log. The value is left out, because it may be a secret."""
    return f": {name.decode()}" if len(name) <= _LONGEST_LOGGED and _NAME.fullmatch(name) is not None else ""


def _malformed(reason: str) -> NoReturn:
    raise StreamFault(ErrorCode.PROTOCOL_ERROR, reason)
