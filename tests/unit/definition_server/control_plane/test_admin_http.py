"""A request and its answer according to RFC 9110 and 9112. Each form of request is sent as a whole and octet by
octet."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from definition_server.control_plane.admin_http import (
    HEADER_OCTETS,
    REQUEST_LINE_OCTETS,
    Answer,
    Exchange,
    Request,
    precondition,
    text_answer,
)

HOST = b"Host: a\r\n"


def given_whole(octets: bytes) -> tuple[Exchange, Request | bytes | None]:
    exchange = Exchange()
    return exchange, exchange.receive(octets)


def octet_by_octet(octets: bytes) -> tuple[Exchange, Request | bytes | None]:
    exchange = Exchange()
    outcome = None
    for place in range(len(octets)):
        outcome = exchange.receive(octets[place : place + 1])
        if outcome is not None:
            break
    return exchange, outcome


def request(octets: bytes) -> Request:
    found = [outcome for _, outcome in (given_whole(octets), octet_by_octet(octets))]
    assert isinstance(found[0], Request)
    assert found[0] == found[1]
    return found[0]


def status(octets: bytes) -> int:
    """The status code of the answer to a refused request."""
    whole, parts = given_whole(octets)[1], octet_by_octet(octets)[1]
    assert isinstance(whole, bytes)
    assert isinstance(parts, bytes)
    assert whole.split(b"\r\n")[0] == parts.split(b"\r\n")[0]
    assert b"\r\nConnection: close\r\n" in whole
    assert b"\r\nDate: " in whole
    return int(whole.split()[1])


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/readyz", "/readyz", ""),
        (b"/readyz?a=b&c", "/readyz", "a=b&c"),
        (b"/metrics?name[]=x", "/metrics", "name[]=x"),
        (b"/%72eady%7A", "/readyz", ""),
        (b"http://host:9464/readyz?x", "/readyz", "x"),
        (b"HTTP://host/readyz", "/readyz", ""),
        (b"http://[::1]:9464/readyz", "/readyz", ""),
        (b"http://host", "/", ""),
        (b"http://host?x=1", "/", "x=1"),
        (b"//readyz", "//readyz", ""),
        (b"/a%2Fb%00", "/a/b\0", ""),
        (b"/%FF", "/\N{REPLACEMENT CHARACTER}", ""),
    ],
)
def test_every_form_of_target_names_a_path(target: bytes, path: str, query: str) -> None:
    found = request(b"GET %s HTTP/1.1\r\n%s\r\n" % (target, HOST))
    assert (found.path, found.query) == (path, query)


@pytest.mark.parametrize(
    "target",
    [
        b"*",
        b"readyz",
        b"/a#b",
        b"/%zz",
        b"/%",
        b"ftp://h/readyz",
        b"http:///readyz",
        b"http://[/x",
        b"http://a b",
        b":/",
    ],
)
def test_a_malformed_target_is_400(target: bytes) -> None:
    assert status(b"GET %s HTTP/1.1\r\n%s\r\n" % (target, HOST)) == 400


@pytest.mark.parametrize("host", [b"a", b"", b"a:1", b"[::1]:9464", b"a_b.svc.cluster.local:9464", b"127.0.0.1"])
def test_a_host_field_is_accepted(host: bytes) -> None:
    assert request(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host).headers["host"] == host.decode()


@pytest.mark.parametrize(
    "fields",
    [b"", b"Host: a b\r\n", b"Host: a\r\nHost: a\r\n", b"Host: a/b\r\n", b"Host: a:b\r\n", b"Host: [::1\r\n"],
    ids=["none", "blank", "two", "slash", "port", "bracket"],
)
def test_a_missing_repeated_or_malformed_host_is_400(fields: bytes) -> None:
    assert status(b"GET /readyz HTTP/1.1\r\n%s\r\n" % fields) == 400


def test_http_1_0_needs_no_host() -> None:
    assert request(b"GET /readyz HTTP/1.0\r\n\r\n").path == "/readyz"


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 400),
        (b"nonsense of some length\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n", 400),
        (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"OPTIONS /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 204),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 204),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: unknown\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: something\r\n\r\n", 417),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 100 + b"\r\n", 431),
    ],
)
def test_a_request_without_a_page_gets_the_status_code_of_its_fault(octets: bytes, expected: int) -> None:
    assert status(octets) == expected


@pytest.mark.parametrize("method", [b"POST", b"OPTIONS"])
def test_the_allowed_methods_are_named(method: bytes) -> None:
    answer = given_whole(b"%s / HTTP/1.1\r\n%s\r\n" % (method, HOST))[1]
    assert isinstance(answer, bytes)
    assert b"\r\nAllow: GET, HEAD, OPTIONS\r\n" in answer


def test_a_request_line_that_is_too_long_is_414_and_fields_that_are_too_long_are_431() -> None:
    assert _status_of(given_whole(b"GET /" + b"a" * HEADER_OCTETS)[1]) == 414
    assert _status_of(given_whole(b"GET /" + b"a" * REQUEST_LINE_OCTETS + b" HTTP/1.1\r\n" + HOST + b"\r\n")[1]) == 414
    assert _status_of(given_whole(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * HEADER_OCTETS)[1]) == 431


def _status_of(outcome: Request | bytes | None) -> int:
    assert isinstance(outcome, bytes)
    return int(outcome.split()[1])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nExpect: 100-continue\r\n",
    ],
    ids=["none", "length", "chunked", "expected"],
)
def test_the_content_of_a_request_is_not_waited_for(content: bytes) -> None:
    exchange, found = given_whole(b"GET /readyz HTTP/1.1\r\nHost: a\r\n%s\r\n" % content)
    assert isinstance(found, Request)
    answer = exchange.answer(text_answer(HTTPStatus.OK, "ready\n"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nready\n")


def test_octets_after_a_request_are_ignored() -> None:
    """Pipelining: the answer has ``Connection: close``, so the client repeats requests that were not answered (9112,
    9.3.2)."""
    whole = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
    exchange, found = given_whole(whole * 3)
    assert isinstance(found, Request)
    assert exchange.answer(text_answer(HTTPStatus.OK, "once")).count(b"HTTP/1.1 200") == 1


def test_empty_lines_before_the_request_are_ignored() -> None:
    assert request(b"\r\n\r\nGET /readyz HTTP/1.1\r\nHost: a\r\n\r\n").path == "/readyz"


@pytest.mark.parametrize(("octets", "decided"), [(15, False), (16, True), (17, True)])
def test_at_most_sixteen_octets_of_empty_lines_are_read(octets: int, decided: bool) -> None:
    empty = (b"\r\n" * 9)[:octets]
    assert given_whole(empty)[1] == octet_by_octet(empty)[1] == (b"" if decided else None)


def test_a_head_request_gets_the_length_and_no_content() -> None:
    exchange, found = given_whole(b"HEAD /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
    assert isinstance(found, Request)
    answer = exchange.answer(text_answer(HTTPStatus.OK, "ready\n"))
    assert b"\r\nContent-Length: 6\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_repeated_fields_are_joined() -> None:
    found = request(b"GET / HTTP/1.1\r\nHost: a\r\nAccept: x\r\nACCEPT: y\r\n\r\n")
    assert found.headers["accept"] == "x, y"


@pytest.mark.parametrize("end", range(1, 30, 4))
def test_a_client_that_ends_in_the_midst_of_a_request_gets_an_answer(end: int) -> None:
    octets = b"GET /readyz HTTP/1.1\r\nHost: abc\r\n\r\n"[:end]
    exchange, outcome = given_whole(octets)
    assert outcome is None
    assert _status_of(exchange.receive(b"")) == 400


def test_a_client_that_sends_nothing_gets_no_answer() -> None:
    assert given_whole(b"")[1] == b""


@pytest.mark.parametrize(
    ("octets", "answer", "fault"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", b"\x15\x03\x01\x00\x02\x02", "TLS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00\x00\x00\x04\x00", "HTTP/2"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\nGET / HTTP/1.1\r\n", b"HTTP/1.1 400 ", "PROXY"),
        (b"\r\n\r\n\x00\r\nQUIT\n\x21\x11", b"HTTP/1.1 400 ", "PROXY"),
    ],
    ids=["TLS", "HTTP/2", "PROXY 1", "PROXY 2"],
)
def test_another_protocol_is_recognised_and_answered_in_that_protocol(octets: bytes, answer: bytes, fault: str) -> None:
    for exchange, outcome in (given_whole(octets), octet_by_octet(octets)):
        assert isinstance(outcome, bytes)
        assert outcome.startswith(answer)
        assert exchange.fault is not None
        assert fault in exchange.fault


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"x"'}, None),
        ({"if-match": "*"}, None),
        ({"if-match": '"x"'}, 412),
        ({"if-match": '"x"', "if-none-match": "*"}, 412),
        ({"if-modified-since": "Sat, 29 Oct 1994 19:43:31 GMT"}, None),
        ({"if-unmodified-since": "Sat, 29 Oct 1994 19:43:31 GMT"}, None),
    ],
)
def test_preconditions_are_evaluated_for_pages_without_etag_and_date(
    headers: dict[str, str], expected: int | None
) -> None:
    answer = precondition(headers)
    assert (None if answer is None else int(answer.status)) == expected


def test_a_304_has_neither_content_nor_length() -> None:
    exchange, _ = given_whole(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    octets = exchange.answer(Answer(HTTPStatus.NOT_MODIFIED))
    assert b"Content-Length" not in octets
    assert octets.endswith(b"\r\n\r\n")


PIECES = [
    b"GET ", b"/readyz", b" HTTP/1.1\r\n", b"Host: a\r\n", b"\r\n", b"\n", b"\x16\x03", b"PRI * HTTP/2.0", b"\0", b":",
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 9\r\n", b" ", b"\xff", b"http://h",
    b"%", b"?", b"HEAD ", b"* ",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.binary(max_size=20))
def test_any_octets_make_a_request_get_an_error_or_wait_for_more(pieces: list[bytes], more: bytes) -> None:
    octets = b"".join(pieces) + more
    for exchange, outcome in (given_whole(octets), octet_by_octet(octets)):
        if outcome is None:
            outcome = exchange.receive(b"")
        if isinstance(outcome, Request):
            assert exchange.answer(text_answer(HTTPStatus.OK, "x")).startswith(b"HTTP/1.1 200")


def test_a_client_that_ends_after_part_of_a_request_gets_the_answer_to_an_incomplete_one() -> None:
    for beginning in (b"GE", b"PRI", b"PROX", b"\r\nG"):
        exchange = Exchange()
        assert exchange.receive(beginning) is None
        answer = exchange.receive(b"")
        assert isinstance(answer, bytes)
        assert answer.startswith(b"HTTP/1.1 400 "), beginning
