"""Cases about requests, messages and answers: RFC 9113 section 8 and gRPC's own documents, as octets."""

from __future__ import annotations

import gzip

from tests.judges.rows_framing import COLLECT, HANG, MESSAGE, META, UNARY, Row, half
from tests.support import h2_wire as wire

MALFORMED = "S:PROTOCOL_ERROR"
WHOLE = wire.data(1, MESSAGE, end_stream=True)


def fields(*extra: tuple[bytes, bytes], path: bytes = UNARY, data: bytes = WHOLE, **replaced: bytes | None) -> bytes:
    """A call with these fields added or replaced."""
    return wire.headers(1, wire.request_block(path, *extra, **replaced)) + data


def body(*messages: bytes, path: bytes = UNARY, **replaced: bytes | None) -> bytes:
    """A call with these octets as its body."""
    return fields(path=path, data=wire.data(1, b"".join(messages), end_stream=True), **replaced)


def unordered() -> bytes:
    """A pseudo-header field after a regular field."""
    listed = wire.request_fields(UNARY)
    return wire.headers(1, wire.block([*listed[1:], listed[0]])) + WHOLE


def bytewise() -> bytes:
    """A message in frames of one octet."""
    last = len(MESSAGE) - 1
    return half() + b"".join(wire.data(1, MESSAGE[i : i + 1], end_stream=i == last) for i in range(last + 1))


LARGE = wire.request_block(UNARY, *((f"x-{i}".encode(), b"v" * 1000) for i in range(20)))
ZIPPED = wire.grpc_message(gzip.compress(b"world"), 1)
BOMB = wire.grpc_message(gzip.compress(bytes(8 << 20)), 1)

CALLS = (
    Row("A28", "20 kB of fields", wire.headers(1, LARGE[:9000], end_headers=False)
        + wire.continuation(1, LARGE[9000:], end_headers=True) + WHOLE, "T:8"),
    Row("A29", "a name in upper case", fields((b"X-A", b"1")), MALFORMED),
    Row("A29", "an empty name", fields((b"", b"1")), MALFORMED),
    Row("A29", "a name with a space", fields((b"x a", b"1")), MALFORMED),
    Row("A29", "a line break in a value", fields((b"x-a", b"1\r\nx-b: 2")), MALFORMED),
    Row("A29", "NUL in a value", fields((b"x-a", b"1\x002")), MALFORMED),
    Row("A29", "a space before a value", fields((b"x-a", b" 1")), MALFORMED),
    Row("A29", "a space behind a value", fields((b"x-a", b"1 ")), MALFORMED),
    Row("A29", "a value that is no UTF-8", fields((b"a", b"caf\xe9")), "T:0"),
    Row("A30", "no :method", fields(method=None), MALFORMED),
    Row("A30", "no :scheme", fields(scheme=None), MALFORMED),
    Row("A30", "no :path", wire.headers(
        1, wire.block(f for f in wire.request_fields(UNARY) if f[0] != b":path")) + WHOLE, MALFORMED),
    Row("A30", "an empty :path", fields(path=b""), MALFORMED),
    Row("A30", ":path twice", wire.headers(1, wire.plain(b":path", UNARY) + wire.request_block(UNARY)) + WHOLE,
        MALFORMED),
    Row("A30", "a pseudo-header behind a field", unordered(), MALFORMED),
    Row("A30", "an unknown pseudo-header", wire.headers(1, wire.plain(b":a", b"1") + wire.request_block(UNARY)) + WHOLE,
        MALFORMED),
    Row("A30", "connection", fields((b"connection", b"keep-alive")), MALFORMED),
    Row("A30", "transfer-encoding", fields((b"transfer-encoding", b"chunked")), MALFORMED),
    Row("A30", "te: gzip", fields(te=b"gzip"), MALFORMED),
    Row("A31", "the right content-length", fields((b"content-length", b"%d" % len(MESSAGE))), "T:0"),
    Row("A31", "content-length too small", fields((b"content-length", b"3")), MALFORMED),
    Row("A31", "content-length too large", fields((b"content-length", b"99")), MALFORMED),
    Row("A31", "content-length that is no number", fields((b"content-length", b"+10")), MALFORMED),
    Row("A31", "two content-lengths", fields((b"content-length", b"10"), (b"content-length", b"11")), MALFORMED),
    Row("A32", "host instead of :authority", fields((b"host", b"a"), authority=None), "T:0"),
    Row("A32", "host beside :authority", fields((b"host", b"a")), "T:0"),
    Row("A32", "two hosts", fields((b"host", b"a"), (b"host", b"b"), authority=None), "T:13"),
    Row("A33", "GET", fields(method=b"GET"), "H:405"),
    Row("A33", "no content-type", fields(content_type=None), "H:415"),
    Row("A33", "text/plain", fields(content_type=b"text/plain"), "H:415"),
    Row("A33", "application/grpc-web", fields(content_type=b"application/grpc-web"), "H:415"),
    Row("A33", "application/grpcfoo", fields(content_type=b"application/grpcfoo"), "H:415"),
    Row("A33", "application/grpc+proto", fields(content_type=b"application/grpc+proto"), "T:0"),
    Row("A33", "application/grpc;charset=utf-8", fields(content_type=b"application/grpc;charset=utf-8"), "T:0"),
    Row("A34", "no te", fields(te=None), "T:0"),
    Row("A35", "an unknown service", fields(path=b"/judges.Nothing/Unary"), "T:12"),
    Row("A35", "an unknown method", fields(path=b"/judges.Rows/Nothing"), "T:12"),
    Row("A35", "a path in another case", fields(path=b"/judges.rows/Unary"), "T:12"),
    Row("A35", "a path without its slash", fields(path=UNARY[1:]), "T:12"),
    Row("A35", "a path with one slash more", fields(path=UNARY + b"/"), "T:12"),
    Row("A35", "a path with dots", fields(path=b"/judges.Rows/../judges.Rows/Unary"), "T:12"),
    Row("A36", "a timeout of ten seconds", fields((b"grpc-timeout", b"10S")), "T:0"),
    Row("A36", "a timeout of 11,415 years", fields((b"grpc-timeout", b"99999999H")), "T:0"),
    Row("A36", "a timeout of 0", fields((b"grpc-timeout", b"0m"), path=HANG), "T:4"),
    Row("A36", "a timeout of nine digits", fields((b"grpc-timeout", b"123456789m")), "T:13"),
    Row("A36", "a timeout of no unit", fields((b"grpc-timeout", b"10")), "T:13"),
    Row("A36", "a timeout of an unknown unit", fields((b"grpc-timeout", b"10x")), "T:13"),
    Row("A36", "a timeout below 0", fields((b"grpc-timeout", b"-1S")), "T:13"),
    Row("A37", "a deadline that passes", fields((b"grpc-timeout", b"50m"), path=HANG), "T:4"),
    Row("A38", "gzip", body(ZIPPED, grpc_encoding=b"gzip"), "T:0 world", body=True),
    Row("A38", "gzip announced and not used", body(MESSAGE, grpc_encoding=b"gzip"), "T:0 world", body=True),
    Row("A38", "an unknown encoding", body(wire.grpc_message(b"?", 1), grpc_encoding=b"snap"), "T:12"),
    Row("A38", "compressed without an encoding", body(ZIPPED), "T:13"),
    Row("A38", "flag 2", body(wire.grpc_message(b"world", 2)), "T:13"),
    Row("A38", "gzip that is none", body(wire.grpc_message(b"garbage", 1), grpc_encoding=b"gzip"), "T:13"),
    Row("A38", "gzip that is cut", body(wire.grpc_message(ZIPPED[5:-9], 1), grpc_encoding=b"gzip"), "T:13"),
    Row("A39", "a message said to have 5 MiB", fields(data=wire.data(1, b"\x00\x00\x50\x00\x00")), "T:8"),
    Row("A39", "a message that inflates to 8 MiB", body(BOMB, grpc_encoding=b"gzip"), "T:8"),
    Row("A40", "a message in frames of one octet", bytewise(), "T:0"),
    Row("A40", "three messages in a frame", body(MESSAGE * 3, path=COLLECT), "T:0 worldworldworld", body=True),
    Row("A40", "a message that is cut", body(MESSAGE[:-1]), "T:13"),
    Row("A40", "a prefix that is cut", body(MESSAGE[:3]), "T:13"),
    Row("A41", "no message", half() + wire.data(1, end_stream=True), "T:12"),
    Row("A41", "no message, END_STREAM with HEADERS", wire.headers(1, wire.request_block(UNARY), end_stream=True),
        "T:12"),
    Row("A41", "two messages", body(MESSAGE * 2), "T:12"),
    Row("A41", "no message where there may be none", half(1, COLLECT) + wire.data(1, end_stream=True), "T:0"),
    Row("A41", "one message and no END_STREAM", half() + wire.data(1, MESSAGE), "open"),
    Row("A42", "base64 with padding", fields((b"x-a-bin", b"AQI="), path=META), 'T:0 [["x-a-bin", [1, 2]]]', body=True),
    Row("A42", "base64 without padding", fields((b"x-a-bin", b"AQI"), path=META),
        'T:0 [["x-a-bin", [1, 2]]]', body=True),
    Row("A42", "two values in one", fields((b"x-a-bin", b"AQ,Ag"), path=META),
        'T:0 [["x-a-bin", [1]], ["x-a-bin", [2]]]', body=True),
    Row("A42", "a name twice, in order", fields((b"x-a", b"2"), (b"x-b", b"3"), (b"x-a", b"1"), path=META),
        'T:0 [["x-a", "2"], ["x-b", "3"], ["x-a", "1"]]', body=True),
    Row("A42", "no base64", fields((b"x-a-bin", b"?!"), path=META), "T:13"),
    Row("A45", "an answer before END_STREAM", half(1, b"/judges.Rows/Nothing"), "T:12"),
    Row("A46", "a handler that raises", wire.call(1, b"/judges.Rows/Fail"), "T:2"),
    Row("A46", "a call that its client resets", wire.call(1, HANG) + wire.rst_stream(1), "open"),
    Row("A49", "twelve PINGs", b"".join(map(wire.ping, [b"pingping"] * 12)), "C:ENHANCE_YOUR_CALM"),
)  # fmt: skip
