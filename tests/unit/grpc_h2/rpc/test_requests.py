"""From a header list to a request: RFC 9113 sections 8.1 to 8.3, PROTOCOL-HTTP2, and grpcio as the reference for the
metadata that a servicer sees.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_h2.rpc import requests as module
from grpc_h2.rpc.faults import CallFault, HttpFault
from grpc_h2.rpc.requests import (
    Field,
    Request,
    check_trailers,
    interpret,
    parse_timeout,
    split_timeout,
)
from grpc_h2.wire.errors import ErrorCode, Http2Error, StreamFault

PSEUDO: tuple[Field, ...] = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/a.S/M"),
    (b":authority", b"me:1"),
)
REGULAR: tuple[Field, ...] = ((b"content-type", b"application/grpc"), (b"te", b"trailers"))
CALL = PSEUDO + REGULAR


def replaced(name: bytes, value: bytes) -> tuple[Field, ...]:
    return tuple((n, value if n == name else v) for n, v in CALL)


def without(name: bytes) -> tuple[Field, ...]:
    return tuple(field for field in CALL if field[0] != name)


def call_fault(*extra: Field, fields: tuple[Field, ...] = CALL) -> CallFault:
    with pytest.raises(CallFault) as raised:
        interpret(fields + extra)
    return raised.value


def assert_malformed(fields: tuple[Field, ...]) -> None:
    for _ in range(2):  # the second time, the verdict is remembered
        with pytest.raises(StreamFault) as raised:
            interpret(fields)
        assert raised.value.code is ErrorCode.PROTOCOL_ERROR


def test_the_fields_of_a_call_become_a_request() -> None:
    extra = ((b"user-agent", b"ua/1"), (b"grpc-timeout", b"5S"), (b"content-length", b"7"), (b"x", b"1"))
    assert interpret(CALL + extra) == Request(
        path="/a.S/M",
        authority="me:1",
        metadata=(("user-agent", "ua/1"), ("content-length", "7"), ("x", "1")),
        timeout=5.0,
        encoding="identity",
        accepts=("identity",),
        content_length=7,
        content_type="application/grpc",
    )


def test_lists_of_accepted_encodings_are_joined() -> None:
    accept = b"grpc-accept-encoding"
    request = interpret((*CALL, (b"grpc-encoding", b"gzip"), (accept, b"identity, gzip,"), (accept, b"deflate")))
    assert (request.encoding, request.accepts) == ("gzip", ("identity", "gzip", "deflate"))


@pytest.mark.requirement("A29", "B-empty-names")
@pytest.mark.parametrize("name", [b"", b"A", b"aB", b"a b", b"a:b", b"caf\xc3\xa9", b"a\0", b"a\r\n", b"(", b"\x7f"])
def test_a_name_that_is_not_a_lower_case_token_is_malformed(name: bytes) -> None:
    assert_malformed((*CALL, (name, b"v")))
    with pytest.raises(StreamFault):
        check_trailers(((name, b"v"),))


@pytest.mark.requirement("A29")
@pytest.mark.parametrize("value", [b"a\0", b"\r", b"a\nb", b" a", b"a ", b"\ta", b"a\t", b" "])
@pytest.mark.parametrize("name", [b"x", b"x-bin", b"te", b"grpc-timeout", b"user-agent", b"content-length", b"cookie"])
def test_a_value_with_nul_cr_lf_or_an_edge_space_is_malformed(name: bytes, value: bytes) -> None:
    assert_malformed((*CALL, (name, value)))
    with pytest.raises(StreamFault):
        check_trailers(((name, value),))


@pytest.mark.requirement("A29")
@pytest.mark.parametrize("value", [b"", b"a b\tc", b"\x01\x7f\x80\xff", b"caf\xc3\xa9"])
def test_any_other_octets_in_a_value_are_not_an_error(value: bytes) -> None:
    ((_, text),) = interpret((*CALL, (b"x", value))).metadata
    assert text in (value.decode("latin-1"), value.decode("utf-8", "replace"))


@pytest.mark.requirement("A30")
@pytest.mark.parametrize("name", [b":method", b":scheme", b":path"])
def test_a_missing_or_empty_pseudo_header_is_malformed(name: bytes) -> None:
    assert_malformed(without(name))
    assert_malformed(replaced(name, b""))


@pytest.mark.requirement("A30")
@pytest.mark.parametrize("field", PSEUDO)
def test_a_pseudo_header_that_is_repeated_or_follows_a_regular_field_is_malformed(field: Field) -> None:
    assert_malformed((field, *CALL))
    assert_malformed((*without(field[0]), field))


@pytest.mark.requirement("A30")
@pytest.mark.parametrize("name", [b":status", b":protocol", b":", b":Method"])
def test_an_unknown_pseudo_header_is_malformed(name: bytes) -> None:
    assert_malformed(((name, b"200"), *CALL))


@pytest.mark.requirement("A30")
@pytest.mark.parametrize("name", [b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"])
def test_a_connection_specific_field_is_malformed(name: bytes) -> None:
    assert_malformed((*CALL, (name, b"close")))


@pytest.mark.requirement("A30")
@pytest.mark.parametrize("value", [b"gzip", b"trailers, deflate", b""])
def test_te_other_than_trailers_is_malformed(value: bytes) -> None:
    assert_malformed(replaced(b"te", value))


@pytest.mark.requirement("A31")
@pytest.mark.parametrize("value", [b"", b"-1", b"+1", b"1,1", b"0x1", b"1 1", b"\xb2", b"9" * 5000])
def test_a_content_length_that_is_not_digits_is_malformed(value: bytes) -> None:
    assert_malformed((*CALL, (b"content-length", value)))


@pytest.mark.requirement("A31")
def test_content_lengths_that_differ_are_malformed() -> None:
    length = b"content-length"
    assert_malformed((*CALL, (length, b"1"), (length, b"2")))
    assert interpret((*CALL, (length, b"1"), (length, b"01"))).content_length == 1


@pytest.mark.requirement("A32")
def test_authority_takes_precedence_over_host_and_host_is_used_without_authority() -> None:
    host = (b"host", b"other")
    assert interpret((*CALL, host)).authority == "me:1"
    assert interpret((*without(b":authority"), host)).authority == "other"
    assert interpret((*replaced(b":authority", b""), host)).authority == "other"
    assert interpret(without(b":authority")).authority == ""


@pytest.mark.requirement("A32")
def test_two_host_fields_fail_the_call_with_internal() -> None:
    assert call_fault((b"host", b"a"), (b"host", b"a")).status == 13
    assert call_fault((b"host", b"a"), (b"host", b"b"), fields=without(b":authority")).status == 13


@pytest.mark.requirement("A33")
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"OPTIONS", b"post", b"M" * 5000])
def test_a_method_other_than_post_is_http_405(method: bytes) -> None:
    with pytest.raises(HttpFault) as raised:
        interpret((*replaced(b":method", method), (b"content-length", b"9")))
    assert (raised.value.status, raised.value.content_length) == (405, 9)
    assert 16 <= len(raised.value.text.encode()) <= 200


@pytest.mark.requirement("A33")
@pytest.mark.parametrize(
    "content_type",
    [
        b"",
        b"text/html",
        b"application/grpc-web",
        b"application/grpc-web+proto",
        b"application/grpcfoo",
        b"x/grpc+proto",
    ],
)
def test_a_content_type_other_than_grpc_is_http_415(content_type: bytes) -> None:
    with pytest.raises(HttpFault) as raised:
        interpret((*replaced(b"content-type", content_type), (b"content-length", b"9")))
    assert (raised.value.status, raised.value.content_length) == (415, 9)
    assert len(raised.value.text.encode()) >= 16


@pytest.mark.requirement("A33")
def test_no_content_type_or_a_second_one_that_is_not_grpc_is_http_415() -> None:
    another = (b"content-type", b"text/html")
    for fields in (without(b"content-type"), (*CALL, another), (*PSEUDO, another, *REGULAR)):
        with pytest.raises(HttpFault) as raised:
            interpret(fields)
        assert raised.value.status == 415


@pytest.mark.requirement("A33")
@pytest.mark.parametrize("suffix", [b"", b"+proto", b"+json", b";charset=x", b"+proto;x"])
def test_a_grpc_content_type_with_format_or_parameters_is_accepted(suffix: bytes) -> None:
    for content_type in (b"application/grpc" + suffix, b"Application/gRPC" + suffix):
        assert interpret(replaced(b"content-type", content_type)).content_type == content_type.decode()


@pytest.mark.requirement("A34")
def test_a_call_without_te_is_accepted() -> None:
    assert interpret(without(b"te")) == interpret(CALL)


@pytest.mark.requirement("A35")
@pytest.mark.parametrize("path", [b"a.S/M", b"*", b"%2Fa.S/M", b"\\a.S\\M", b"/a.S/\xff", b"\xff"])
def test_a_path_without_a_leading_slash_or_not_in_utf_8_is_unimplemented(path: bytes) -> None:
    assert call_fault((b"content-length", b"4"), fields=replaced(b":path", path)).status == 12
    assert call_fault((b"content-length", b"4"), fields=replaced(b":path", path)).content_length == 4


@pytest.mark.requirement("A35")
@pytest.mark.parametrize("path", [b"/", b"//a.S/M", b"/a.S/M/", b"/a.S/m", b"/a.S/../M", b"/a.S/%4D", b"/a.S/M?x"])
def test_a_path_is_kept_exactly(path: bytes) -> None:
    assert interpret(replaced(b":path", path)).path == path.decode()


@pytest.mark.requirement("A36")
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"0n", 0.0),
        (b"00000000H", 0.0),
        (b"1n", 1e-9),
        (b"4999976u", 4.999976),
        (b"5010m", 5.01),
        (b"5S", 5.0),
        (b"2M", 120.0),
        (b"1H", 3600.0),
        (b"99999999H", 359_999_996_400.0),
    ],
)
def test_a_timeout_is_read_in_seconds(value: bytes, seconds: float) -> None:
    assert parse_timeout(value) == seconds
    assert interpret((*CALL, (b"grpc-timeout", value))).timeout == seconds


@pytest.mark.requirement("A36")
@pytest.mark.parametrize("value", [b"", b"S", b"5", b"5s", b"123456789S", b"-1S", b"5 S", b"1.5S", b"+1S", b"\xb2S"])
def test_a_malformed_timeout_fails_the_call_with_internal(value: bytes) -> None:
    assert call_fault((b"grpc-timeout", value)).status == 13
    with pytest.raises(CallFault) as raised:
        parse_timeout(value)
    assert raised.value.status == 13


@pytest.mark.requirement("A42")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"", [b""]),
        (b"AQ", [b"\1"]),
        (b"AQ==", [b"\1"]),
        (b"AQ=", [b"\1"]),
        (b"AAEC", [b"\0\1\2"]),
        (b"AQ==,Ag", [b"\1", b"\2"]),
        (b"AQ, Ag==", [b"\1", b"\2"]),
        (b"AQ,,Ag", [b"\1", b"", b"\2"]),
    ],
)
def test_binary_values_are_split_at_commas_and_decoded(value: bytes, expected: list[bytes]) -> None:
    assert interpret((*CALL, (b"x-bin", value))).metadata == tuple(("x-bin", part) for part in expected)


@pytest.mark.requirement("A42")
@pytest.mark.parametrize("value", [b"A", b"A*BC", b"-_-_", b"AR", b"AQ==AQ", b"AQ,A", b"A Q", b"\xff\xff"])
def test_a_bad_binary_value_fails_the_call_with_internal(value: bytes) -> None:
    fault = call_fault((b"x-bin", value), (b"content-length", b"3"))
    assert (fault.status, fault.content_length) == (13, 3)


@pytest.mark.requirement("A42", "B-hpack-bomb")
def test_a_binary_value_of_too_many_commas_fails_with_resource_exhausted() -> None:
    assert len(interpret((*CALL, (b"x-bin", b"," * 99))).metadata) == 100
    assert call_fault((b"x-bin", b"," * 16_000)).status == 8


@pytest.mark.requirement("A42")
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5), st.booleans())
def test_any_octets_survive_base64_padded_or_not(values: list[bytes], padded: bool) -> None:
    coded = [b64encode(value) if padded else b64encode(value).rstrip(b"=") for value in values]
    assert interpret((*CALL, (b"x-bin", b",".join(coded)))).metadata == tuple(("x-bin", value) for value in values)


@pytest.mark.requirement("A42")
def test_duplicates_of_a_field_keep_their_order() -> None:
    extra = ((b"x", b"2"), (b"y", b"0"), (b"x", b"1"), (b"x", b"2"))
    assert interpret(CALL + extra).metadata == (("x", "2"), ("y", "0"), ("x", "1"), ("x", "2"))


@pytest.mark.requirement("A15")
def test_trailers_with_a_pseudo_header_are_malformed() -> None:
    check_trailers(((b"x", b"1"), (b"x-bin", b"not base64"), (b"content-length", b"3")))
    for field in PSEUDO:
        with pytest.raises(StreamFault):
            check_trailers(((b"x", b"1"), field))


@pytest.mark.requirement("A29", "A33")
def test_malformed_fields_take_precedence_over_http_faults_and_http_faults_over_call_faults() -> None:
    bad_call = ((b"grpc-timeout", b"x"), (b"x-bin", b"*"), (b"host", b"a"), (b"host", b"b"))
    assert_malformed((*replaced(b":method", b"GET"), *bad_call, (b"X", b"1")))
    assert_malformed((*bad_call, *CALL))
    with pytest.raises(HttpFault):
        interpret((*replaced(b":method", b"GET"), *bad_call))
    with pytest.raises(HttpFault):
        interpret((*replaced(b"content-type", b"x"), *bad_call))


NAMES = [
    b":method",
    b":path",
    b"grpc-timeout",
    b"x",
    b"x-bin",
    b"te",
    b"content-type",
    b"host",
    b"content-length",
    b"X",
]
VALUES = [b"", b"POST", b"/p", b"5S", b"0n", b"7m", b"123456789S", b"9\0S", b" 1S", b"1", b"trailers", b"AQ", b"A"]
ANY_FIELD = st.tuples(
    st.one_of(st.sampled_from(NAMES), st.binary(max_size=6)), st.one_of(st.sampled_from(VALUES), st.binary(max_size=6))
)


def outcome(judge: Callable[[], Request]) -> Any:
    try:
        return judge()
    except Http2Error as fault:
        return type(fault), str(fault), vars(fault)


@pytest.mark.requirement("D4")
@given(
    st.lists(ANY_FIELD, max_size=4),
    st.lists(ANY_FIELD, max_size=4),
    st.sampled_from([(), *(((b"grpc-timeout", value),) for value in VALUES)]),
    st.sampled_from([(), PSEUDO, CALL]),
)
def test_fields_split_from_their_timeout_give_the_same_request(
    before: list[Field], after: list[Field], timeout: tuple[Field, ...], call: tuple[Field, ...]
) -> None:
    for fields in ((*before, *call, *timeout, *after), (*call, *before, *timeout, *after), (*timeout, *call, *after)):
        rest, value = split_timeout(fields)

        def apart(rest: tuple[Field, ...] = rest, value: bytes | None = value) -> Request:
            request = interpret(rest)
            return request if value is None else request.with_timeout(parse_timeout(value))

        assert outcome(apart) == outcome(partial(interpret, fields))


@given(st.lists(ANY_FIELD, max_size=8))
def test_any_fields_give_a_request_or_a_fault(fields: list[Field]) -> None:
    for judged in (tuple(fields), (*CALL, *fields)):
        outcome(partial(interpret, judged))
        with suppress(StreamFault):
            check_trailers(judged)


@pytest.mark.requirement("D4")
@given(st.lists(ANY_FIELD, max_size=8))
def test_a_remembered_verdict_on_fields_equals_the_first_verdict(fields: list[Field]) -> None:
    module._verdicts.clear()
    first = outcome(lambda: interpret((*CALL, *fields)))
    assert outcome(lambda: interpret((*CALL, *fields))) == first


@pytest.mark.requirement("D5")
def test_remembered_verdicts_are_bounded_in_number_and_size() -> None:
    module._verdicts.clear()
    for number in range(3 * module._MOST_VERDICTS):
        interpret((*CALL, (b"x", b"%d" % number), (b"grpc-timeout", b"%dm" % number)))
        interpret((*CALL, (b"x", b"%d" % number + b"v" * module._LONGEST_REMEMBERED)))
        assert len(module._verdicts) <= module._MOST_VERDICTS
    assert all(len(n) + len(v) <= module._LONGEST_REMEMBERED for n, v in module._verdicts)
    assert not [name for name, _ in module._verdicts if name == b"grpc-timeout"]


SHOWN_AND_HIDDEN = (
    *((name.encode(), b"1") for name in ["x", "via", "accept", "cookie", "authorization", "grpc-foo", "lb-token"]),
    *((name.encode(), b"1") for name in ["grpc-previous-rpc-attempts", "grpc-retry-pushback-ms", "host", "user-agent"]),
    *((name.encode(), b"AAAA") for name in ["x-bin", "grpc-foo-bin", "grpc-trace-bin", "grpc-tags-bin"]),
    *((name.encode(), b"AAAA") for name in ["grpc-server-stats-bin", "endpoint-load-metrics-bin"]),
    *((name.encode(), b"1") for name in ["grpc-message", "grpc-status", "x-envoy-peer-metadata"]),
    *((b"lb-cost-bin", b"AAAAAAAAAAAA"), (b"grpc-timeout", b"5S"), (b"grpc-encoding", b"identity")),
    *((b"grpc-accept-encoding", b"identity, gzip"), (b"content-length", b"5")),
    *((b"x", b"2"), (b"x", b""), (b"y", b"caf\xc3\xa9"), (b"z", b"caf\xe9\xff"), (b"e-bin", b""), (b"p-bin", b"AQ==")),
)


async def test_a_servicer_gets_the_same_metadata_as_on_grpcio() -> None:
    fields = CALL + SHOWN_AND_HIDDEN
    shown: asyncio.Future[list[tuple[str, str | bytes]]] = asyncio.get_running_loop().create_future()

    async def answer(_: bytes, context: Any) -> bytes:
        shown.set_result([(key, value) for key, value in context.invocation_metadata()])
        return b""

    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("a.S", {"M": grpc.unary_unary_rpc_method_handler(answer)}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        # Literals without indexing (RFC 7541 section 6.2.2), no Huffman; every length fits in one octet.
        block = b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        writer.write(frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5)))
        expected = await asyncio.wait_for(shown, 20)
    finally:
        writer.close()
        await writer.wait_closed()
        await server.stop(None)
    # C-core puts the names that it knows first, so only the order of fields with the same name is compared.
    assert sorted(interpret(fields).metadata, key=lambda entry: entry[0]) == sorted(
        expected, key=lambda entry: entry[0]
    )


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
