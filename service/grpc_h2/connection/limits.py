"""The limits for one peer. Every limit states its reason, the values of other servers, and the worst case that it
allows.

"Glitches" are cheap misdeeds: each is legal or harmless alone and an attack in numbers. All of them are drawn from one
leaky bucket per connection, so that no attack is below every threshold at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf, isnan

from grpc_h2.wire.frames import DEFAULT_FRAME_SIZE, DEFAULT_WINDOW, LARGEST_WINDOW

BACKLOG = 4096
"""Connections that may wait in the kernel to be accepted, as when a whole fleet reconnects at once. The kernel limits
it to ``net.core.somaxconn``, 4096 since Linux 5.4."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one connection. Times in seconds, sizes in octets."""

    max_concurrent_streams: int = 256
    """The most streams open at once. Streams that are already reset are included while their handlers run, so that a
    reset frees nothing before the work has really ended (CVE-2023-44487). RFC 9113 advises 100 or more; Go 250, hyper
    200, Envoy 1024."""

    initial_window: int = 256 * 1024
    """Request octets that the client may send on a stream before they are read. The requests of our methods are small;
    256 KiB allow 20 Gbit/s if a round trip takes 0.1 ms."""

    connection_window: int = 1024 * 1024
    """Request octets of all streams that the client may send before they are read. This bounds the octets of whole
    messages that a connection can make the server hold."""

    max_buffered: int = 8 * 1024 * 1024
    """Octets of *unfinished* messages on a connection; beyond this limit no window is given back until some messages
    are finished. Twice ``max_message``, so that one message can always be finished while others are unfinished."""

    max_unread: int = 16 * 1024 * 1024
    """Octets of whole messages that handlers have not taken yet. Windows bound the octets on the wire, not the inflated
    size: gzip reaches 1000 to 1, so a megabyte of window may become a gigabyte."""

    max_message: int = 4 * 1024 * 1024
    """Octets of a request's message, both as it is sent and when it is inflated: 4 MiB as in every gRPC implementation.
    A server whose requests are names needs a few KiB (`Router.limit_requests` sets the limit for one method): inflating
    4 MiB takes 4 ms, during which no other connection is served; 4 KiB take 10 µs. The limit is checked by the
    message's prefix, before any octet of the message is held, and while the message is inflated."""

    body_timeout: float = 10.0
    """Time from HEADERS to END_STREAM of a request of one message, which every client writes at once (nginx
    ``client_body_timeout`` 60 s for each read, Envoy none). Worst case: all streams of a connection wait for this time,
    and each holds a message of the greatest size."""

    drain_body_timeout: float = 1.0
    """The time limit in place of `body_timeout` while the connection drains. A stream whose body does not arrive
    lengthens a shutdown by this time at most."""

    rest_timeout: float = 1.0
    """The time for which the server waits for the rest of a request after the answer, before RST_STREAM with NO_ERROR
    asks the client to stop (nginx reads on for 5 s, ``lingering_timeout``; grpc-go and C-core send RST_STREAM at once,
    which costs some clients behind Envoy their answers). Worst case: 64 KiB of each of 256 streams are read and thrown
    away."""

    max_header_list: int = 16 * 1024
    """Sum of name + value + 32 over the fields of a request. PROTOCOL-HTTP2 advises 8 KiB; C-core 8 soft, 16 hard.
    Checked for each field while decoding, which bounds the memory amplification of HPACK (CVE-2016-6581)."""

    max_header_fields: int = 100
    """The most fields of a request; Envoy 100. Prevents 16,000 one-octet references to an empty field."""

    hard_header_list: int = 128 * 1024
    """A header list above this size (counted as in `max_header_list`) is an attack, not a mistake: it ends the whole
    connection, not only the call."""

    hard_header_fields: int = 128
    """A header list of more fields is also an attack. A block must be decoded to its end, because otherwise the tables
    of both sides differ afterwards; 16,000 references take 2 ms."""

    max_continuations: int = 8
    """The most CONTINUATION frames of a block (VU#421644); nghttp2 8, h2 5. Eight full frames carry 128 KiB."""

    max_header_block: int = 64 * 1024
    """Octets of one encoded block, before decoding."""

    max_settings_entries: int = 32
    """The most entries of one SETTINGS frame; nghttp2 32, Go 100."""

    glitches: int = 1000
    """The number of glitches that the bucket holds; nghttp2 1,000 resets or 10,000 glitches, h2 1,024. Worst case: a
    thousand requests begun and reset, some 20 ms of CPU once per connection."""

    glitches_per_second: float = 200.0
    """The rate at which the bucket leaks: an honest client whose deadlines are too short may cancel calls at this rate
    for ever. nghttp2 33 resets/s or 330 glitches/s."""

    free_window_updates: int = 5
    """The WINDOW_UPDATEs that are allowed in addition to two for each stream and twenty for each DATA frame sent
    (Envoy's formula)."""

    calls_per_turn: int = 32
    """The most new calls with a handler in one turn of the loop; C-core reads 32 before it yields."""

    answers_per_turn: int = 64
    """The most ready answers in one turn: 0.1 to 0.15 ms of CPU time, including the write."""

    work_per_turn: int = 60
    """The most work of one turn, in units of about a microsecond, as `abuse` weighs frames, header lists and inflated
    octets. This limits the time for which other connections wait while a client sends the most expensive input."""

    octets_per_turn: int = 256 * 1024
    """Octets that are written for one connection before the loop serves other connections."""

    late_frames_per_stream: int = 4
    """Frames that an honest client may send on a stream after its end, for each stream that it has opened: RST_STREAM
    although the answer has arrived (old grpc-js, with every call), or DATA and WINDOW_UPDATE that cross with our
    RST_STREAM. Further frames count as glitches, and the bucket admits 4,000 such frames at once. Worst case: 4 frames
    of 4 µs for each call."""

    replies_per_turn: int = 1000
    """The most control frames (SETTINGS ACK, PING ACK, RST_STREAM; CVE-2019-9512, -9514, -9515) that are queued before
    they must be written. No input is read while the transport does not accept them. nghttp2, Envoy 1,000; Go, C-core
    10,000."""

    high_water: int = 64 * 1024
    """Octets that a stream may have queued before its handler has to wait (h2 400 KiB, grpc-go 64 KiB)."""

    low_water: int = 16 * 1024
    """Queued octets at or below which a waiting handler continues."""

    preface_timeout: float = 10.0
    """Time from connecting to the client's preface and SETTINGS (Go 10 s, grpc-go 120 s): bounds silent sockets. Over
    TLS this time begins at the end of the handshake, for which the peer has the same time; waits for time slices are
    not included. So a peer that sends an octet now and then holds its place for 20 s; at most 512 handshakes are
    held."""

    header_timeout: float = 10.0
    """Time from HEADERS to END_HEADERS."""

    stall_timeout: float = 60.0
    """The time for which a peer may read no queued octet at all (TCP or the HTTP/2 windows show this) before it is
    disconnected. Meanwhile the memory of its answers cannot be released. nginx 60 s."""

    read_grace: float = 30.0
    """The time for which a stream's octets may wait to be read, in addition to the time that `min_read_rate` allows. It
    is enough for a client that pauses for a garbage collection or changes its network."""

    min_read_rate: float = 32.0 * 1024
    """Octets a second at which an answer must be read, on each stream (Apache ``MinRate`` 500, IIS 240, h2o none; their
    answers are files of the kernel, ours hold an old snapshot in memory). The value is a quarter of a megabit a second,
    as in the slowest mobile networks. Worst case: 200 MB may take `max_read_time`."""

    max_read_time: float = 600.0
    """The time for which a complete answer of any size may wait to be read. 200 MB in ten minutes are 2.7 Mbit/s. Worst
    case: a replaced catalogue stays in memory for this time, because an answer from it is not read."""

    keepalive_time: float = 7200.0
    """The time without input after which a PING checks whether the peer is alive (A8: 2 h)."""

    keepalive_timeout: float = 20.0
    """The time within which the peer must answer that PING (A8: 20 s)."""

    min_ping_interval: float = 10.0
    """PINGs count as strikes if their average interval is shorter and the server has sent nothing in between, with or
    without calls. gRPC proposal A8 has 5 min with calls and 2 h without, as have the servers of Go and Java. But 10 s
    is the shortest interval that gRPC lets a client choose, and clients of this server choose it, even without calls.
    Strikes are forgiven a quarter faster than they are counted, because the clocks of both sides differ and networks
    may deliver several frames at once. Worst case: a PING and its answer, some 5 µs, every 8 s on each connection."""

    max_ping_strikes: int = 2
    """The strikes that are allowed. One more strike ends the connection with ``too_many_pings`` (A8)."""

    max_connection_age: float = inf
    """The age at which a connection is drained, so that clients also use servers that were added (A9)."""

    age_jitter: float = 0.1
    """The share by which `max_connection_age` varies, so that connections made at the same time do not end at the same
    time (A9: 10 %)."""

    age_grace: float = inf
    """The time that calls have to finish after `max_connection_age` has been reached (A9)."""

    max_connection_idle: float = inf
    """The time without an open stream after which a connection is drained (A9)."""

    drain_timeout: float = 1.0
    """The time for which the PING that follows the first GOAWAY may stay unanswered before the second GOAWAY is sent
    (Go 5 s, Java 10, C-core 20). Calls that cross with the second GOAWAY are not served and are safe to repeat, because
    this GOAWAY names the last call that is served. A client that answers no PING lengthens a shutdown by this time."""

    max_held: int = 64 * 1024 * 1024
    """Octets that all connections of a server hold together for their peers (`Budget`): input, header blocks, bodies,
    output that waits, streams. Beyond this limit the connection that holds most is ended. Envoy's overload manager and
    C-core's resource quota do the same; neither has a default. 10,000 connections with one `Watch` each hold some 40
    MiB."""

    max_held_by_strangers: int = 32 * 1024 * 1024
    """The limit in place of `max_held` for connections that have not yet made a call which the server admits. They are
    counted separately. Beyond this limit the one of them that holds most is ended, and never a connection of a client.
    10,000 peers that connect at once hold some 10 MiB."""

    def __post_init__(self) -> None:
        """Check each limit and the relations between limits.

        Raises:
            ValueError: with the names of the fields, and the remedy.
        """
        problems = self._ranges() or self._relations()
        if problems:
            raise ValueError("; ".join(problems))

    def _ranges(self) -> list[str]:
        """The faults of limits that are outside their own range."""
        problems = []
        for field in fields(self):
            value = getattr(self, field.name)
            least = _LEAST.get(field.name, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or isnan(value) or value < least:
                problems.append(f"{field.name} is {value!r}: give a number of {least} or more")
        problems += [
            f"{name} is {getattr(self, name)}: the largest window of RFC 9113 is {LARGEST_WINDOW}"
            for name in ("initial_window", "connection_window")
            if getattr(self, name) > LARGEST_WINDOW
        ]
        if self.age_jitter > 1:
            problems.append(f"age_jitter is {self.age_jitter}: give a share from 0 to 1")
        return problems

    def _relations(self) -> list[str]:
        """The faults of limits that contradict each other."""
        ordered = (
            ("initial_window", "connection_window", "one stream's window must fit into the connection's"),
            ("low_water", "high_water", "a handler that waits at the second continues at the first"),
            ("max_header_list", "hard_header_list", "a list beyond the first is refused, beyond the second an attack"),
            (
                "max_header_fields",
                "hard_header_fields",
                "more than the first are refused, more than the second an attack",
            ),
            ("drain_body_timeout", "body_timeout", "a drain shortens the time for a body"),
            ("max_header_list", "max_header_block", "a list within its limit must fit into a block"),
            ("max_message", "max_unread", "a message that is whole must be able to wait for its handler"),
        )
        problems = [
            f"{lower} ({getattr(self, lower)}) is above {upper} ({getattr(self, upper)}): lower the first or raise the "
            f"second ({reason})"
            for lower, upper, reason in ordered
            if getattr(self, lower) > getattr(self, upper)
        ]
        if self.max_buffered < 2 * self.max_message:
            problems.append(
                f"max_buffered ({self.max_buffered}) is below twice max_message ({self.max_message}): raise the first "
                "or lower the second (one message must be finishable beside others)"
            )
        return problems


_LEAST = {
    "max_concurrent_streams": 1,
    "initial_window": 1,
    "connection_window": DEFAULT_WINDOW,
    "max_header_list": 256,
    "max_header_fields": 8,
    "max_header_block": DEFAULT_FRAME_SIZE,
    "glitches": 1,
    "calls_per_turn": 1,
    "answers_per_turn": 1,
    "work_per_turn": 1,
    "octets_per_turn": 1,
    "replies_per_turn": 1,
    "min_read_rate": 1,
    "max_held": 64 * 1024,
    "max_held_by_strangers": 64 * 1024,
}
"""Limit → its least value, if that value is not 0. A window is not smaller than the initial window of HTTP/2 (RFC 9113
section 6.9.2), because only SETTINGS can make a stream's window smaller, and nothing can make the connection's window
smaller."""
