"""One request over HTTP/1.1 (RFC 9110, RFC 9112), without I/O. An `Exchange` takes octets and returns the request or
octets to send. The parser is h11.

Every connection carries one request and ends with its answer (``Connection: close``). More is not needed: probes open a
connection for each request anyway, and a scraper makes four requests a minute. A connection that ends soon needs no
bookkeeping for a next request. A request's content is never read: no page needs it, and a server that closes the
connection need not read it (9112, 9.3).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import unquote, urlsplit

import h11

REQUEST_LINE_OCTETS = 8192
"""RFC 9112, 3 recommends at least 8000. nginx: 8 kB, Apache httpd: 8190."""
HEADER_OCTETS = 16 * 1024
"""The most octets of request line and header fields together. nginx: 4 buffers of 8 kB; Node: 16 kB."""
HEADER_FIELDS = 100
"""Apache httpd: 100."""

_ALLOWED = "GET, HEAD, OPTIONS"
_KNOWN_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
# RFC 3986, 3.2.2 and 3.2.3: a name or IPv4 address, or an IP literal in brackets; then a port. An empty Host is valid
# if the target has no authority (RFC 9110, 7.2).
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.vV~_-]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")

# RFC 9113: the connection preface of a client (3.4); SETTINGS, which a server sends first; and GOAWAY with
# HTTP_1_1_REQUIRED (7), which names the protocol to use instead.
_HTTP2_PREFACE = b"PRI * HTTP/2.0"
_HTTP2_ANSWER = (
    b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    + b"\x00\x00\x08\x07\x00\x00\x00\x00\x00"
    + b"\x00\x00\x00\x00\x00\x00\x00\x0d"
)
# RFC 8446, 5.1 and 6: a handshake record; a fatal alert, unexpected_message.
_TLS_RECORD = b"\x16\x03"
_TLS_ANSWER = b"\x15\x03\x01\x00\x02\x02\x0a"
_PROXY = (b"PROXY ", b"\r\n\r\n\x00\r\nQUIT\n")
_FOREIGN = (_HTTP2_PREFACE, _TLS_RECORD, *_PROXY)
_MOST_UNDECIDED = 16
"""So many octets show which protocol the client speaks, unless all of them are empty lines."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for a page."""

    path: str
    """Decoded, without the query."""
    query: str
    headers: dict[str, str]
    """Field name in lower case → value; the values of a repeated field joined by commas (9110, 5.3)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a request."""

    status: HTTPStatus
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


def text_answer(status: HTTPStatus, text: str, *headers: tuple[str, str]) -> Answer:
    """An answer with ``text`` as its content."""
    return Answer(status, text.encode(), (("Content-Type", "text/plain; charset=utf-8"), *headers))


class Refusal(Exception):
    """A request that is answered without a page."""

    def __init__(self, status: HTTPStatus, text: str, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.answer = text_answer(status, f"{text}\n", *headers)


class Exchange:
    """One request and its answer."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_OCTETS)
        self._beginning = b""
        self._recognised = False
        """Whether the first octets are those of HTTP/1."""
        self._method = ""
        self.fault: str | None = None
        """The client's fault, for the log; None if there is none."""

    def receive(self, data: bytes) -> Request | bytes | None:
        """Take octets from the client; empty octets mean the end of its input.

        Returns:
            The request for a page, once it is complete; or octets to send, if it is refused; or None, if more octets
            are needed.
        """
        if self._recognised:
            return self._read(data)
        self._beginning += data
        if foreign := self._foreign(self._beginning):
            return foreign
        # A server should ignore an empty line before the request line (9112, 2.2).
        beginning = self._beginning.lstrip(b"\r\n")
        undecided = not beginning or any(each.startswith(self._beginning) for each in _FOREIGN)
        if data and undecided and len(self._beginning) < _MOST_UNDECIDED:
            return None
        self._recognised = True
        if not beginning:
            return b""
        if data:
            return self._read(beginning)
        self._http.receive_data(beginning)
        return self._read(b"")

    def _foreign(self, beginning: bytes) -> bytes | None:
        """The answer to a client that speaks another protocol, in that protocol."""
        if beginning.startswith(_TLS_RECORD):
            self.fault = "it began a TLS handshake; this port speaks cleartext HTTP/1.1"
            return _TLS_ANSWER
        if beginning.startswith(_HTTP2_PREFACE):
            self.fault = "it spoke HTTP/2; this port speaks HTTP/1.1"
            return _HTTP2_ANSWER
        if beginning.startswith(_PROXY):
            self.fault = "it sent a PROXY protocol header; this port takes none"
            return self.answer(text_answer(HTTPStatus.BAD_REQUEST, "PROXY protocol is not spoken here.\n"))
        return None

    def _read(self, data: bytes) -> Request | bytes | None:
        self._http.receive_data(data)
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            if status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE and b"\n" not in self._http.trailing_data[0]:
                status = HTTPStatus.REQUEST_URI_TOO_LONG
            self.fault = f"malformed HTTP: {status.value} {status.phrase}"
            return self.answer(text_answer(status, f"{status.phrase}.\n"))
        if not isinstance(event, h11.Request):
            return b"" if isinstance(event, h11.ConnectionClosed) else None
        self._method = event.method.decode()
        try:
            request = _request(event)
        except Refusal as refusal:
            self.fault = f"refused: {refusal.answer.status.value} {refusal}"
            return self.answer(refusal.answer)
        return self.answer(request) if isinstance(request, Answer) else request

    def answer(self, answer: Answer, *, dated: bool = True) -> bytes:
        """The octets of ``answer``; ``dated``: whether it carries the present date (9110, 6.6.1). An answer that is
        made in advance does not.
        """
        headers = [
            *([("Date", formatdate(usegmt=True))] if dated else []),
            *answer.headers,
            ("Content-Length", str(len(answer.body))),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ]
        if answer.status is HTTPStatus.NO_CONTENT or answer.status is HTTPStatus.NOT_MODIFIED:
            headers = [field for field in headers if field[0] != "Content-Length"]
        response = h11.Response(status_code=answer.status, headers=headers, reason=answer.status.phrase)
        sent = self._http.send(response) or b""
        if answer.body and self._method != "HEAD" and answer.status is not HTTPStatus.NOT_MODIFIED:
            sent += self._http.send(h11.Data(data=answer.body)) or b""
        return sent + (self._http.send(h11.EndOfMessage()) or b"")


def _request(event: h11.Request) -> Request | Answer:
    """The request for a page in ``event``, or the answer to OPTIONS.

    Raises:
        Refusal: if it is neither.
    """
    if not event.http_version.startswith(b"1."):
        raise Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    headers = _fields(event)
    if not _HOST.fullmatch(headers.get("host", "")):
        raise Refusal(HTTPStatus.BAD_REQUEST, "The Host field is malformed.")
    if "transfer-encoding" in headers and "content-length" in headers:
        raise Refusal(HTTPStatus.BAD_REQUEST, "Transfer-Encoding and Content-Length exclude each other.")
    expectation = headers.get("expect", "100-continue")
    if expectation.lower() != "100-continue":
        raise Refusal(HTTPStatus.EXPECTATION_FAILED, "Only the expectation 100-continue is known here.")
    method, target = event.method.decode(), event.target.decode("latin-1")
    if len(target) > REQUEST_LINE_OCTETS:
        raise Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "The request line is too long.")
    if method not in _KNOWN_METHODS:
        raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "Only GET and HEAD are answered.")
    if method not in ("GET", "HEAD", "OPTIONS"):
        raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD are answered.", ("Allow", _ALLOWED))
    path, query = _path_and_query(target, asterisk=method == "OPTIONS")
    if method == "OPTIONS":
        return Answer(HTTPStatus.NO_CONTENT, headers=(("Allow", _ALLOWED),))
    return Request(path, query, headers)


def _fields(event: h11.Request) -> dict[str, str]:
    headers: dict[str, str] = {}
    if len(event.headers) > HEADER_FIELDS:
        raise Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "There are too many header fields.")
    for raw_name, raw_value in event.headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _path_and_query(target: str, *, asterisk: bool) -> tuple[str, str]:
    """Path and query of a request target (9112, 3.2) in origin form, absolute form, or, with ``asterisk``, ``*``."""
    if target == "*" and asterisk:
        return "*", ""
    if not target.startswith("/"):
        try:
            parts = urlsplit(target)
        except ValueError:
            raise Refusal(HTTPStatus.BAD_REQUEST, "The request target is malformed.") from None
        authority = parts.netloc
        if parts.scheme not in ("http", "https") or not authority or not _HOST.fullmatch(authority):
            raise Refusal(HTTPStatus.BAD_REQUEST, "The request target is neither a path nor an http URL.")
        target = target[target.index("//") + 2 + len(authority) :]
        if not target.startswith("/"):
            target = f"/{target}"
    path, _, query = target.partition("?")
    if "#" in target or _BAD_ESCAPE.search(target):
        raise Refusal(HTTPStatus.BAD_REQUEST, "The request target is malformed.")
    return unquote(path, errors="replace"), query


def precondition(headers: dict[str, str]) -> Answer | None:
    """The answer to a request whose precondition fails (9110, 13); None if none fails. Called for requests that are
    otherwise answered with 200.

    The pages have no entity tag and no modification date. So a tag matches no page, ``*`` matches every page, and the
    fields with dates are ignored, as 13.1.3 and 13.1.4 demand.
    """
    if headers.get("if-match", "*").strip() != "*":
        return text_answer(HTTPStatus.PRECONDITION_FAILED, "The pages have no entity tags.\n")
    if headers.get("if-none-match", "").strip() == "*":
        return Answer(HTTPStatus.NOT_MODIFIED)
    return None
