"""Intended deviations of our engine from grpcio: the reasons, and the outcome on grpcio in each case."""

from __future__ import annotations

REASONS: dict[str, dict[str, str]] = {
    "RFC 9113 makes it an error of the connection, because later octets have no certain meaning. C-core ignores it.": {
        "A4 DATA on stream 0": "open",
        "A4 HEADERS on stream 0": "open",
        "A4 PRIORITY on stream 0": "open",
        "A4 RST_STREAM on stream 0": "open",
        "A4 PING on a stream": "open",
        "A4 GOAWAY on a stream": "open",
        "A4 PUSH_PROMISE": "open",
        "A10 an even stream": "open",
        "A10 a lower stream than before": "open",
        "A11 DATA on an idle stream": "open",
        "A11 RST_STREAM on an idle stream": "open",
        "A11 WINDOW_UPDATE on an idle stream": "open",
        "A19 a window that grows beyond 2^31-1": "open",
        "A21 the connection's window beyond 2^31-1": "open",
    },
    "RFC 9113 makes it an error of the stream, and a client with this error should be informed. C-core ignores it.": {
        "A3 PRIORITY of 4 octets": "open",
        "A8 a stream that depends on itself": "open",
        "A12 DATA after END_STREAM": "open",
        "A12 HEADERS after END_STREAM": "open",
        "A21 a stream's window beyond 2^31-1": "open",
        "A15 trailers with a pseudo-header": "T:0",
    },
    "RFC 9113 makes it an error of the stream. C-core ends the connection, and with it every other call.": {
        "A15 trailers without END_STREAM": "closed",
        "A21 WINDOW_UPDATE of 0 on a stream": "closed",
    },
    "Padding is legal, and nghttp -b sends it. C-core does not understand it.": {
        "A6 padded HEADERS": "closed",
        "A6 HEADERS with padding and priority": "closed",
        "A6 padded DATA": "S:PROTOCOL_ERROR",
        "A6 more padding than DATA": "S:PROTOCOL_ERROR",
    },
    "RFC 7541 demands the check: if a decoder accepts two encodings of one string, filters can be evaded.": {
        "A24 Huffman padding of more than 7 bits": "T:0",
        "A24 Huffman code with EOS": "T:0",
        "A25 a size update after a field": "T:0",
    },
    "Our limits apply from the first octet on; C-core's apply from the client's ACK on, which it may withhold.": {
        "A28 20 kB of fields": "T:0",
    },
    "The resources that one connection can hold are bounded here. C-core sets no bound unless it is configured.": {
        "A14 call 300 of a connection": "open",
    },
    "A malformed name is a malformed request, RFC 9113 section 8.1.1: it is reset, not answered as if it were "
    "a call.": {
        "A13 what was on its way when we reset a stream": 'T:13, T:0 [["x-a", "1"]]',
        "A27 a refused call leaves the table in step": 'T:13, T:0 [["x-a", "1"]]',
        "A29 a name in upper case": "T:13",
        "A29 an empty name": "T:13",
        "A29 a name with a space": "T:13",
        "A30 an unknown pseudo-header": "T:13",
        "A30 te: gzip": "T:13",
    },
    "Line breaks, NUL or edge spaces in a value smuggle fields to an HTTP/1.1 server behind (section 8.2.1).": {
        "A29 a line break in a value": "T:0",
        "A29 NUL in a value": "T:0",
        "A29 a space before a value": "T:0",
        "A29 a space behind a value": "T:0",
    },
    "A malformed request, RFC 9113 sections 8.2.2 to 8.3.1, is reset with PROTOCOL_ERROR.": {
        "A30 no :method": "S:INTERNAL_ERROR",
        "A30 no :scheme": "S:INTERNAL_ERROR",
        "A30 no :path": "S:INTERNAL_ERROR",
        "A30 an empty :path": "T:12",
        "A30 :path twice": "T:0",
        "A30 a pseudo-header behind a field": "T:0",
        "A30 connection": "T:0",
        "A30 transfer-encoding": "T:0",
    },
    "With a false content-length, the proxy that forwarded a request may assume another end of it (section 8.1.1).": {
        "A31 content-length too small": "T:0",
        "A31 content-length too large": "T:0",
        "A31 content-length that is no number": "T:0",
        "A31 two content-lengths": "T:0",
    },
    "A request that is not gRPC gets an HTTP answer (PROTOCOL-HTTP2) that any client reads, not a status or reset.": {
        "A33 GET": "S:INTERNAL_ERROR",
        "A33 no content-type": "T:0",
        "A33 text/plain": "T:0",
        "A33 application/grpc-web": "T:0",
        "A33 application/grpcfoo": "T:0",
    },
    "te only shows that proxies keep trailers. Go and Java serve without it, and nothing here depends on it.": {
        "A34 no te": "S:INTERNAL_ERROR",
    },
    "PROTOCOL-HTTP2 allows eight digits.": {
        "A36 a timeout of nine digits": "T:0",
    },
    "compression.md names UNIMPLEMENTED, with the known encodings, so that a client can choose another one.": {
        "A38 an unknown encoding": "T:13",
    },
    "PROTOCOL-HTTP2 has only flags 0 and 1: octets under another flag are not the message.": {
        "A38 flag 2": "T:0",
    },
    "A call whose message is cut, is missing or is not the only one cannot be answered. It ends at once with a status "
    "(statuscodes.md), instead of hanging until its deadline or getting a part of an answer.": {
        "A40 a message that is cut": "open",
        "A40 a prefix that is cut": "open",
        "A41 no message": "open",
        "A41 no message, END_STREAM with HEADERS": "open",
        "A41 two messages": "T:0",
    },
    "Only END_STREAM shows that the request of a unary call is one message.": {
        "A41 one message and no END_STREAM": "T:0",
    },
    "PROTOCOL-HTTP2: binary values may be joined with commas.": {
        "A42 two values in one": "T:13",
    },
}
"""Reason → row → the outcome on grpcio (in the form of `outcome.outcome`)."""

GRPCIO = {row: line for rows in REASONS.values() for row, line in rows.items()}
