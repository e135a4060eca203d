"""How much one peer may ask for. Every limit states its reason, the values of other servers, and the worst case that it
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
    """Streams open at once, including streams already reset whose handlers still run, so that a reset frees nothing
    before the work has really ended (CVE-2023-44487). RFC 9113 advises 100 or more; Go 250, hyper 200, Envoy 1024."""

    initial_window: int = 256 * 1024
    """Request octets that a stream may send before they are read. Requests here are small; 256 KiB allow 20 Gbit/s
    if a round trip takes 0.1 ms."""

    connection_window: int = 1024 * 1024
    """Unread request octets of all streams: bounds how much a connection can make us hold in whole messages."""

    max_buffered: int = 8 * 1024 * 1024
    """Octets of *unfinished* messages on a connection; beyond it no window is given back until some are finished.
    Twice ``max_message``, so that one message can always be finished beside others."""

    max_unread: int = 16 * 1024 * 1024
    """Octets of whole messages that handlers have not taken yet. Windows bound the octets on the wire, not their
    inflated size: gzip reaches 1000 to 1, so a megabyte of window may become a gigabyte."""

    max_message: int = 4 * 1024 * 1024
    """A message of a request, as it is sent and when it is inflated: 4 MiB as in every gRPC implementation. A server
    whose requests are names needs a few KiB (`Router.limit_requests` sets it for one method): to inflate 4 MiB takes 4
    ms, during which no other connection is served; 4 KiB take 10 µs. The limit is checked by a message's prefix, before
    any of it is held, and while it is inflated."""

    body_timeout: float = 10.0
    """Time from HEADERS to END_STREAM of a request of one message, which every client writes at once (nginx
    ``client_body_timeout`` 60 s for each read, Envoy none). Worst case: all streams of a connection wait for this time,
    and each holds as much as its message may hold."""

    drain_body_timeout: float = 1.0
    """The same while the connection drains. A stream whose body does not arrive lengthens a shutdown by no more than
    this."""

    rest_timeout: float = 1.0
    """How long the server waits for the rest of a request after its answer, before RST_STREAM with NO_ERROR asks the
    client to stop (nginx reads on for 5 s, ``lingering_timeout``; grpc-go and C-core send RST_STREAM at once, which
    costs some clients behind Envoy their answers). Worst case: 64 KiB of each of 256 streams are read and thrown
    away."""

    max_header_list: int = 16 * 1024
    """Sum of name + value + 32 over the fields of a request. PROTOCOL-HTTP2 advises 8 KiB; C-core 8 soft, 16 hard.
    Checked for each field while decoding, which bounds the memory amplification of HPACK (CVE-2016-6581)."""

    max_header_fields: int = 100
    """Fields of a request; Envoy 100. Stops 16,000 one-octet references to an empty field."""

    hard_header_list: int = 128 * 1024
    """A list beyond this is an attack, not a mistake: it ends the whole connection, not only the call."""

    hard_header_fields: int = 128
    """A list of more fields is an attack, too. A block must be decoded to its end, or the tables of both sides differ
    from then on; 16,000 references take 2 ms."""

    max_continuations: int = 8
    """CONTINUATION frames of a block (VU#421644); nghttp2 8, h2 5. Eight full frames carry 128 KiB."""

    max_header_block: int = 64 * 1024
    """Octets of one encoded block, before decoding."""

    max_settings_entries: int = 32
    """Entries of one SETTINGS frame; nghttp2 32, Go 100."""

    glitches: int = 1000
    """Depth of the bucket; nghttp2 1,000 resets or 10,000 glitches, h2 1,024. Worst case: a thousand requests begun
    and reset, some 20 ms of CPU once per connection."""

    glitches_per_second: float = 200.0
    """Rate at which the bucket leaks: an honest client whose deadlines are too short may go on cancelling calls at this
    rate for ever. nghttp2 33 resets/s or 330 glitches/s."""

    free_window_updates: int = 5
    """WINDOW_UPDATEs allowed beyond two for a stream and twenty for a DATA frame sent (Envoy's formula)."""

    calls_per_turn: int = 32
    """New calls with a handler in one turn of the loop; C-core reads 32 before it yields."""

    answers_per_turn: int = 64
    """Ready answers in one turn: 0.1 to 0.15 ms of CPU, including the write."""

    work_per_turn: int = 60
    """Work of one turn in units of about a microsecond, as `abuse` weighs it: frames, header lists, octets inflated. It
    limits how long other connections wait while a client sends the most expensive input."""

    octets_per_turn: int = 256 * 1024
    """Octets written for one connection before the loop serves the others."""

    late_frames_per_stream: int = 4
    """Frames that an honest client may send on a stream after its end, for each stream that it has opened: RST_STREAM
    although the answer has arrived (old grpc-js, with every call), or DATA and WINDOW_UPDATE that cross with our
    RST_STREAM. Further ones are glitches, of which the bucket admits 4,000 at once. Worst case: 4 frames of 4 µs for
    each call."""

    replies_per_turn: int = 1000
    """Control frames queued (SETTINGS ACK, PING ACK, RST_STREAM; CVE-2019-9512, -9514, -9515) before they must have
    been written; nothing is read while the transport does not accept them. nghttp2, Envoy 1,000; Go, C-core 10,000."""

    high_water: int = 64 * 1024
    """Octets that a stream may have queued before its handler has to wait (h2 400 KiB, grpc-go 64 KiB)."""

    low_water: int = 16 * 1024
    """Queued octets at or below which a waiting handler continues."""

    preface_timeout: float = 10.0
    """Time from connecting to the client's preface and SETTINGS (Go 10 s, grpc-go 120 s): bounds silent sockets. Over
    TLS it begins at the end of the handshake, for which the peer has as much time again; its waits for time slices do
    not count. So a peer that sends an octet now and then holds its place for 20 s; at most 512 handshakes are held."""

    header_timeout: float = 10.0
    """Time from HEADERS to END_HEADERS."""

    stall_timeout: float = 60.0
    """How long a peer may leave every queued octet unread, by TCP or by windows, before it is disconnected. Meanwhile
    the memory of its answers cannot be released. nginx 60 s."""

    read_grace: float = 30.0
    """How long a stream's octets may wait to be read, in addition to the time by `min_read_rate`. It covers a client
    that pauses for a garbage collection or changes its network."""

    min_read_rate: float = 32.0 * 1024
    """Octets a second at which an answer must be read, on each stream (Apache ``MinRate`` 500, IIS 240, h2o none; their
    answers are files of the kernel, ours hold an old snapshot in memory). A quarter of a megabit a second, as in the
    slowest mobile networks. Worst case: 200 MB may take `max_read_time`."""

    max_read_time: float = 600.0
    """How long a complete answer may wait to be read, however large it is. 200 MB in ten minutes are 2.7 Mbit/s. Worst
    case: a replaced catalogue stays in memory for so long, because an answer from it is not read."""

    keepalive_time: float = 7200.0
    """Silence after which a PING checks whether the peer is alive (A8: 2 h)."""

    keepalive_timeout: float = 20.0
    """How long the answer to that PING may take (A8: 20 s)."""

    min_ping_interval: float = 10.0
    """PINGs at shorter intervals on average, with nothing sent by us in between, are strikes, with or without calls.
    gRPC proposal A8 has 5 min with calls and 2 h without, and so do the servers of Go and Java. But 10 s is the
    shortest interval that gRPC lets a client choose, and clients of this server choose it, even without calls. Strikes
    are forgiven a quarter faster than they are counted, because the clocks of both sides differ and networks may
    deliver several frames at once. Worst case: a PING and its answer, some 5 µs, every 8 s on each connection."""

    max_ping_strikes: int = 2
    """One strike more ends the connection with ``too_many_pings`` (A8)."""

    max_connection_age: float = inf
    """Age at which a connection is drained, so that clients spread over servers that were added (A9)."""

    age_jitter: float = 0.1
    """Share by which the age varies, so that connections made at the same time do not end at the same time (A9: 10
    %)."""

    age_grace: float = inf
    """Time that calls have to finish after the age has been reached (A9)."""

    max_connection_idle: float = inf
    """Without a stream for this long, a connection is drained (A9)."""

    drain_timeout: float = 1.0
    """How long the PING that follows the first GOAWAY may stay unanswered before the second GOAWAY is sent (Go 5 s,
    Java 10, C-core 20). Calls that cross with the second GOAWAY are not served and are safe to repeat, because it names
    the last call that is served. A client that answers no PING lengthens a shutdown by this time."""

    max_held: int = 64 * 1024 * 1024
    """Octets that all connections of a server hold together for their peers (`Budget`): input, header blocks, bodies,
    output that waits, streams. Beyond it the connection that holds most is ended. Envoy's overload manager and C-core's
    resource quota do the same; neither has a default. 10,000 connections with one `Watch` each hold some 40 MiB."""

    max_held_by_strangers: int = 32 * 1024 * 1024
    """The same for connections that have not made a call yet which the server admits; counted apart from `max_held`.
    Beyond it the heaviest of these is ended, and no connection of a client. 10,000 that connect at once hold some 10
    MiB."""

    def __post_init__(self) -> None:
        """Check each limit, and the relations between limits.

        Raises:
            ValueError: with the names of the fields, and what to do.
        """
        problems = self._ranges() or self._relations()
        if problems:
            raise ValueError("; ".join(problems))

    def _ranges(self) -> list[str]:
        """The faults of limits that are out of their own range."""
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
        """The fault of limits that rely on each other."""
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
"""The least value of a limit, if that is not 0. No window is smaller than the initial one of every connection (RFC
9113 section 6.9.2), because only SETTINGS can make a stream's window smaller, and nothing can make the connection's
window smaller."""
