"""Requests and their messages on a connection (RFC 9113 section 8, PROTOCOL-HTTP2)."""

from __future__ import annotations

import base64
import gzip

import pytest
from tests.support.h2_peer import ANSWER, GUARDED, HANDLED, STATIC, Keys, Peer, some_router
from tests.support.h2_wire import (
    DATA,
    PROTOCOL_ERROR,
    Feed,
    block,
    bytewise,
    data,
    grpc_message,
    headers,
    plain,
    request_block,
    request_fields,
    three_ways,
    window_update,
)

BODY = grpc_message(b"world")


def requested(fields: bytes, body: bytes = BODY, stream: int = 1) -> bytes:
    """A request with its body and END_STREAM."""
    return headers(stream, fields) + data(stream, body, end_stream=True)


def without(*names: bytes) -> bytes:
    return block(pair for pair in request_fields() if pair[0] not in names)


# --- well-formed fields --------------------------------------------------------------------------------------

MALFORMED = {
    "upper case name": request_block() + plain(b"Upper", b"x"),
    "empty name": request_block() + plain(b"", b"x"),
    "space in name": request_block() + plain(b"a b", b"x"),
    "colon in name": request_block() + plain(b"a:b", b"x"),
    "control in name": request_block() + plain(b"a\x00", b"x"),
    "high octet in name": request_block() + plain(b"a\xc3", b"x"),
    "nul in value": request_block() + plain(b"a", b"x\0y"),
    "line feed in value": request_block() + plain(b"a", b"x\ny"),
    "carriage return in value": request_block() + plain(b"a", b"x\ry"),
    "leading space": request_block() + plain(b"a", b" x"),
    "trailing tab": request_block() + plain(b"a", b"x\t"),
    "no method": without(b":method"),
    "no scheme": without(b":scheme"),
    "no path": without(b":path"),
    "nothing": b"",
    "empty path": request_block(b""),
    "empty method": request_block(method=b""),
    "empty scheme": request_block(scheme=b""),
    "two methods": plain(b":method", b"POST") + request_block(),
    "two paths": plain(b":path", b"/t.S/Get") + request_block(),
    "two schemes": plain(b":scheme", b"http") + request_block(),
    "two authorities": plain(b":authority", b"localhost") + request_block(),
    "unknown pseudo header": plain(b":protocol", b"websocket") + request_block(),
    "response pseudo header": plain(b":status", b"200") + request_block(),
    "pseudo header after a field": plain(b"a", b"x") + request_block(),
    "connection": request_block() + plain(b"connection", b"close"),
    "proxy connection": request_block() + plain(b"proxy-connection", b"x"),
    "keep alive": request_block() + plain(b"keep-alive", b"5"),
    "transfer encoding": request_block() + plain(b"transfer-encoding", b"chunked"),
    "upgrade": request_block() + plain(b"upgrade", b"h2c"),
    "te other than trailers": request_block(te=b"trailers, deflate"),
    "content length not digits": request_block(content_length=b"1O"),
    "content length with sign": request_block(content_length=b"+10"),
    "content length empty": request_block(content_length=b""),
    "differing content lengths": request_block(content_length=b"10") + plain(b"content-length", b"11"),
}


@pytest.mark.requirement("A29", "A30", "A31", "B-empty-names", "B-made-you-reset")
@three_ways
@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("end", ["with HEADERS", "with DATA", "later"])
def test_a_malformed_request_is_a_stream_error(feed: Feed, name: str, end: str):
    peer = Peer(feed).send(headers(1, MALFORMED[name], end_stream=end == "with HEADERS"))
    if end == "with DATA":
        peer.send(data(1, BODY, end_stream=True))
    peer.assert_reset(1, PROTOCOL_ERROR)
    assert not peer.calls


@pytest.mark.requirement("A29")
@three_ways
def test_other_octets_in_values_are_not_an_error(feed: Feed):
    odd = bytes(range(1, 256)).replace(b"\n", b"").replace(b"\r", b"")
    assert odd[:1] != b" "
    peer = Peer(feed).send(requested(request_block() + plain(b"a", odd) + plain(b"b", b"") + plain(b"c", b"x  y")))
    peer.assert_answered(1)
    peer.send(headers(3, request_block(HANDLED) + plain(b"a", b"\xff\xfe"), end_stream=True))
    peer.answer(3, b"x")
    peer.assert_answered(3, b"x")


@pytest.mark.requirement("A31")
@three_ways
@pytest.mark.parametrize("announced", [b"9", b"11", b"0", b"99999999999999999999"])
@pytest.mark.parametrize("path", [STATIC, HANDLED])
def test_a_body_of_another_length_than_announced_is_a_stream_error(feed: Feed, announced: bytes, path: bytes):
    peer = Peer(feed).send(requested(request_block(path, content_length=announced)))
    peer.assert_reset(1, PROTOCOL_ERROR)


@pytest.mark.requirement("A31")
@three_ways
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_a_wrong_content_length_is_a_stream_error_even_for_a_plain_http_answer(feed: Feed, method: bytes):
    fields = request_block(method=method, content_type=b"text/plain", content_length=b"11")
    Peer().send(requested(fields)).assert_reset(1, PROTOCOL_ERROR)
    Peer(feed).send(headers(1, fields, end_stream=True)).assert_reset(1, PROTOCOL_ERROR)


@pytest.mark.requirement("A31", "C-h2load-first-flight", "C-curl")
@three_ways
def test_a_body_of_the_announced_length_is_answered(feed: Feed):
    peer = Peer(feed)
    peer.send(requested(request_block(content_length=b"10")))
    peer.send(requested(request_block() + plain(b"content-length", b"10") * 2, stream=3))
    peer.send(
        headers(5, request_block(content_length=b"10")), data(5, BODY[:3], pad=4), data(5, BODY[3:], end_stream=True)
    )
    for stream in (1, 3, 5):
        peer.assert_answered(stream)


# --- authority, method, content type, path -------------------------------------------------------------------


@pytest.mark.requirement("A32")
@three_ways
def test_authority_takes_precedence_over_host_and_host_is_used_without_authority(feed: Feed):
    peer = Peer(feed).send(
        headers(1, request_block(HANDLED, (b"host", b"other"))),
        headers(3, request_block(HANDLED, (b"host", b"other"), authority=None)),
        headers(5, request_block(HANDLED, authority=None)),
    )
    assert peer.calls[1].request.authority == "localhost"
    assert peer.calls[3].request.authority == "other"
    assert peer.calls[5].request.authority == ""


@pytest.mark.requirement("A32")
@three_ways
def test_two_host_fields_end_the_call_with_internal(feed: Feed):
    peer = Peer(feed).send(requested(request_block(STATIC, (b"host", b"a"), (b"host", b"b"), authority=None)))
    peer.assert_status(1, 13)


@pytest.mark.requirement("A33")
@three_ways
@pytest.mark.parametrize(
    ("status", "replaced"),
    [
        (405, {"method": b"GET"}),
        (405, {"method": b"PUT"}),
        (405, {"method": b"post"}),
        (415, {"content_type": None}),
        (415, {"content_type": b"application/grpc-web"}),
        (415, {"content_type": b"application/grpcfoo"}),
        (415, {"content_type": b"application/json"}),
        (415, {"content_type": b""}),
    ],
)
def test_a_request_that_is_not_grpc_gets_a_plain_http_answer_before_its_body_has_arrived(
    feed: Feed, status: int, replaced: dict[str, bytes]
):
    peer = Peer(feed).send(headers(1, request_block(**replaced)))
    result = peer.result(1)
    assert (result.http_status, result.ended, result.reset) == (status, True, None)
    peer.send(data(1, BODY), data(1, end_stream=True))
    peer.advance(5)
    assert result.reset is None
    assert len(result.body) >= 16
    assert (b"content-length", b"%d" % len(result.body)) in result.headers
    assert any(name == b"content-type" and value.startswith(b"text/plain") for name, value in result.headers)
    assert result.status is None
    peer.assert_alive()


@pytest.mark.requirement("A33", "A20")
@three_ways
def test_a_plain_http_answer_stays_within_the_windows(feed: Feed):
    from tests.support.h2_wire import INITIAL_WINDOW_SIZE, settings

    peer = Peer(feed).send(
        settings((INITIAL_WINDOW_SIZE, 1)), headers(1, request_block(method=b"GET"), end_stream=True)
    )
    assert len(peer.result(1).body) == 1
    peer.send(window_update(1, 1000))
    assert peer.result(1).ended
    assert [got.flags for got in peer.replies.frames if got.kind == DATA][-1] == 1


@pytest.mark.requirement("A33")
@three_ways
@pytest.mark.parametrize(
    "kind", [b"application/grpc", b"application/grpc+proto", b"application/grpc;charset=utf-8", b"application/grpc+"]
)
def test_every_grpc_content_type_is_accepted(feed: Feed, kind: bytes):
    Peer(feed).send(requested(request_block(content_type=kind))).assert_answered(1)


@pytest.mark.requirement("A34")
@three_ways
def test_a_request_without_te_is_answered(feed: Feed):
    Peer(feed).send(requested(request_block(te=None))).assert_answered(1)


@pytest.mark.requirement("A35")
@three_ways
@pytest.mark.parametrize("path", [b"t.S/Guarded", b"t.S/Get", b"*", b"?/t.S/Guarded"])
def test_a_path_without_a_leading_slash_is_refused_before_authorization(feed: Feed, path: bytes):
    keys = Keys("Bearer k1")
    peer = Peer(feed, router=some_router(keys)).send(requested(request_block(path)))
    peer.assert_status(1, 12)
    assert keys.asked == 0
    assert not peer.calls


@pytest.mark.requirement("A35")
@three_ways
@pytest.mark.parametrize(
    "path", [b"/t.S/get", b"/T.S/Get", b"/t.S/Get/", b"//t.S/Get", b"/t.S/./Get", b"/t.S/%47et", b"/t.S/Get?a=b", b"/"]
)
def test_a_path_is_compared_exactly(feed: Feed, path: bytes):
    peer = Peer(feed).send(requested(request_block(path)))
    if 1 in peer.calls:
        assert peer.calls[1].request.path == path.decode()
    else:
        peer.assert_status(1, 12)


# --- timeouts ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A36")
@three_ways
@pytest.mark.parametrize("path", [STATIC, HANDLED])
@pytest.mark.parametrize(
    "value", [b"", b"S", b"1", b"123456789S", b"1x", b"-1S", b"+1S", b"1.5S", b"1 S", b"0x1S", b"1s", b"1SS"]
)
def test_a_malformed_timeout_ends_the_call_with_internal(feed: Feed, path: bytes, value: bytes):
    peer = Peer(feed).send(requested(request_block(path, grpc_timeout=value)))
    peer.assert_status(1, 13)
    assert not peer.calls


@pytest.mark.requirement("A36", "A37")
@three_ways
@pytest.mark.parametrize("path", [STATIC, HANDLED])
@pytest.mark.parametrize("value", [b"0S", b"0n", b"00000000H"])
def test_a_timeout_of_zero_expires_at_once(feed: Feed, path: bytes, value: bytes):
    peer = Peer(feed).send(requested(request_block(path, grpc_timeout=value)))
    peer.assert_status(1, 4)


@pytest.mark.requirement("A36")
@three_ways
@pytest.mark.parametrize("value", [b"1H", b"1M", b"1S", b"5000m", b"4999976u", b"99999999n", b"99999999H"])
def test_every_unit_and_the_largest_timeout_are_accepted(feed: Feed, value: bytes):
    peer = Peer(feed).send(requested(request_block(grpc_timeout=value)))
    peer.assert_answered(1)
    peer.send(requested(request_block(HANDLED, grpc_timeout=value), stream=3))
    assert 3 in peer.calls
    peer.answer(3, b"x")
    peer.assert_answered(3, b"x")


# --- messages ------------------------------------------------------------------------------------------------


def zipped(message: bytes, flag: int = 1) -> bytes:
    return grpc_message(gzip.compress(message, mtime=0), flag)


@pytest.mark.requirement("A38")
@three_ways
def test_an_unknown_encoding_is_answered_with_the_known_ones(feed: Feed):
    peer = Peer(feed).send(requested(request_block(grpc_encoding=b"snappy"), grpc_message(b"?", 1)))
    peer.assert_status(1, 12)
    accepted = dict(peer.result(1).headers + (peer.result(1).trailers or []))[b"grpc-accept-encoding"]
    assert {b"identity", b"gzip"} <= {name.strip() for name in accepted.split(b",")}


@pytest.mark.requirement("A38", "A40")
@three_ways
@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        (None, grpc_message(b"world", 1)),
        (b"identity", grpc_message(b"world", 1)),
        (None, grpc_message(b"world", 2)),
        (b"gzip", grpc_message(b"world", 255)),
        (b"gzip", grpc_message(b"not gzip", 1)),
        (b"gzip", grpc_message(gzip.compress(b"world", mtime=0)[:-3], 1)),
        (b"gzip", grpc_message(b"", 1)),
        (None, BODY[:-1]),
        (None, BODY[:3]),
        (None, BODY + b"\0"),
    ],
)
def test_a_message_that_cannot_be_read_ends_the_call_with_internal(feed: Feed, encoding: bytes | None, body: bytes):
    extra = {} if encoding is None else {"grpc_encoding": encoding}
    peer = Peer(feed).send(requested(request_block(**extra), body))
    peer.assert_status(1, 13)


@pytest.mark.requirement("A38")
@three_ways
@pytest.mark.parametrize("body", [grpc_message(b"world"), zipped(b"world")])
def test_gzip_is_understood_and_the_flag_of_the_message_decides(feed: Feed, body: bytes):
    Peer(feed).send(requested(request_block(grpc_encoding=b"gzip"), body)).assert_answered(1)


@pytest.mark.requirement("A39")
@three_ways
@pytest.mark.parametrize("path", [STATIC, HANDLED])
def test_a_declared_length_above_the_limit_is_rejected_from_the_prefix(feed: Feed, path: bytes):
    peer = Peer(feed).send(headers(1, request_block(path)), data(1, b"\0" + (4 * 1024 * 1024 + 1).to_bytes(4, "big")))
    peer.send(data(1, b"more", end_stream=True))
    result = peer.result(1)
    assert (result.status, result.ended) == (8, True)
    peer.assert_alive()


@pytest.mark.requirement("A39", "B-inflate-bomb")
@three_ways
@pytest.mark.parametrize("path", [STATIC, HANDLED])
def test_an_inflated_length_above_the_limit_ends_the_call_with_resource_exhausted(feed: Feed, path: bytes):
    peer = Peer(feed).send(requested(request_block(path, grpc_encoding=b"gzip"), zipped(bytes(8 * 1024 * 1024))))
    assert (peer.result(1).status, peer.result(1).ended) == (8, True)
    assert 1 not in peer.received
    peer.assert_alive()


@pytest.mark.requirement("A40")
@three_ways
def test_messages_that_are_not_aligned_with_frames_arrive_whole(feed: Feed):
    octets = b"".join(grpc_message(bytes((n,)) * n) for n in range(30))
    pieces = [*bytewise(octets[:50]), octets[50:300], b"", octets[300:]]
    peer = Peer(feed).send(headers(1, request_block(HANDLED)), *(data(1, piece) for piece in pieces))
    peer.send(data(1, end_stream=True))
    assert peer.received[1] == [bytes((n,)) * n for n in range(30)]
    assert peer.half_closed == {1}


@pytest.mark.requirement("A40", "A41")
@three_ways
def test_a_static_call_sent_octet_by_octet_is_answered(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block()), *(data(1, octet) for octet in bytewise(BODY)))
    assert 1 not in peer.replies.streams
    peer.send(data(1, end_stream=True)).assert_answered(1)


@pytest.mark.requirement("A40")
@three_ways
def test_a_message_that_end_stream_cuts_ends_the_call_with_internal(feed: Feed):
    peer = Peer(feed).send(requested(request_block(HANDLED), BODY + BODY[:-1]))
    assert peer.received[1] == [b"world"]
    assert (peer.result(1).status, peer.result(1).ended) == (13, True)
    assert 1 in peer.cancelled
    peer.assert_alive()


@pytest.mark.requirement("A41")
@three_ways
@pytest.mark.parametrize("body", [b"", BODY + BODY, BODY * 3, BODY + grpc_message(b"")])
def test_a_static_call_without_exactly_one_message_is_unimplemented(feed: Feed, body: bytes):
    Peer(feed).send(requested(request_block(), body)).assert_status(1, 12)


@pytest.mark.requirement("A41")
@three_ways
def test_a_static_call_without_a_body_is_unimplemented(feed: Feed):
    Peer(feed).send(headers(1, request_block(), end_stream=True)).assert_status(1, 12)


@pytest.mark.requirement("A41")
@three_ways
def test_an_empty_message_is_one_message(feed: Feed):
    Peer(feed).send(requested(request_block(), grpc_message(b""))).assert_answered(1, b"")


@pytest.mark.requirement("A41")
@three_ways
def test_a_static_answer_waits_for_end_stream(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block()), data(1, BODY))
    assert 1 not in peer.replies.streams
    peer.send(data(1, end_stream=True)).assert_answered(1, ANSWER)


# --- binary metadata -----------------------------------------------------------------------------------------


@pytest.mark.requirement("A42")
@three_ways
def test_binary_metadata_is_split_decoded_and_kept_in_order(feed: Feed):
    raw = [b"\xff\x00\x01", b"a", b"", b"ab"]
    joined = b",".join([base64.b64encode(raw[0]), base64.b64encode(raw[1]).rstrip(b"=")])
    fields = (
        plain(b"x-bin", joined)
        + plain(b"y", b"1")
        + plain(b"x-bin", b"")
        + plain(b"x-bin", b"YWI=")
        + plain(b"y", b"0")
    )
    peer = Peer(feed).send(headers(1, request_block(HANDLED) + fields))
    seen = [pair for pair in peer.calls[1].request.metadata if pair[0] in ("x-bin", "y")]
    assert seen == [("x-bin", raw[0]), ("x-bin", raw[1]), ("y", "1"), ("x-bin", raw[2]), ("x-bin", raw[3]), ("y", "0")]


@pytest.mark.requirement("A42")
@three_ways
@pytest.mark.parametrize("value", [b"*", b"Y", b"YWI=x", b"YW I", b"\xff\xfe", b"YQ==,*"])
@pytest.mark.parametrize("path", [STATIC, GUARDED, HANDLED])
def test_a_bad_binary_value_ends_only_its_call(feed: Feed, value: bytes, path: bytes):
    peer = Peer(feed).send(requested(request_block(path) + plain(b"x-bin", value)))
    peer.assert_status(1, 13)
    assert not peer.calls


@three_ways
def test_a_static_method_with_a_key_answers_only_calls_with_that_key(feed: Feed):
    peer = Peer(feed)
    peer.send(requested(request_block(GUARDED)), requested(request_block(GUARDED, authorization=b"Bearer x"), stream=3))
    peer.assert_answered(1)
    peer.assert_status(3, 16)
    assert peer.result(3).text == b"who are you?"
