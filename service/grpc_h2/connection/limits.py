"""How much one peer may ask for. Every limit states its reason, what others take, and the worst it allows.

"Glitches" are cheap misdeeds: each is legal or harmless alone and an attack in numbers. All of them are drawn from one
leaky bucket per connection, so that no attack is below every threshold at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one connection. Times in seconds, sizes in octets."""

    max_concurrent_streams: int = 256
    """Streams open at once, running handlers of streams already reset among them (so that a reset frees nothing
    before the work has really ended: CVE-2023-44487). RFC 9113 advises 100 or more; Go 250, hyper 200, Envoy 1024."""

    initial_window: int = 256 * 1024
    """Request octets a stream may send unread. Requests here are small; 256 KiB carries 20 Gbit/s at 0.1 ms."""

    connection_window: int = 1024 * 1024
    """Request octets of all streams unread: bounds what a connection can make us hold in whole messages."""

    max_buffered: int = 8 * 1024 * 1024
    """Octets of *unfinished* messages on a connection; beyond it no window is given back until some are finished.
    Twice ``max_message``, so that one message can always be finished beside others."""

    max_unread: int = 16 * 1024 * 1024
    """Octets of whole messages that handlers have not taken yet. Windows bound what comes over the wire, not what it
    inflates to: gzip reaches 1000 to 1, and a megabyte of window would become a gigabyte."""

    max_message: int = 4 * 1024 * 1024
    """A message, compressed or not: 4 MiB as in every gRPC implementation."""

    max_inflated_static: int = 16 * 1024
    """A compressed request of a static method, inflated. Such a request is a short name that is looked up. Inflating
    4 MiB takes milliseconds, during which no other connection is served; 16 KiB take some 40 µs."""

    max_header_list: int = 16 * 1024
    """Sum of name + value + 32 of a request. PROTOCOL-HTTP2 advises 8 KiB; C-core 8 soft, 16 hard. Checked per field
    while decoding, so the memory amplification of HPACK (CVE-2016-6581) ends here."""

    max_header_fields: int = 100
    """Fields of a request; Envoy 100. Stops 16,000 one-octet references to an empty field."""

    hard_header_list: int = 128 * 1024
    """A list beyond this is an attack, not a mistake: the whole connection ends, not only the call."""

    hard_header_fields: int = 128
    """The same for the number of fields. A block must be decoded to its end, or the tables of both sides differ from
    then on; 16,000 references take 2 ms."""

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
    """Rate at which the bucket leaks: an honest client whose deadlines are too short may cancel this often without end.
    nghttp2 33 resets/s or 330 glitches/s."""

    free_window_updates: int = 5
    """WINDOW_UPDATEs allowed beyond two for a stream and twenty for a DATA frame sent (Envoy's formula)."""

    calls_per_turn: int = 32
    """New calls with a handler for one turn of the loop; C-core reads 32 before it yields."""

    answers_per_turn: int = 64
    """Ready answers for one turn: 0.1 to 0.15 ms of CPU, writing among it."""

    work_per_turn: int = 60
    """Work of one turn in units of about a microsecond, as `abuse` weighs it: frames, header lists, octets inflated. It
    limits how long other connections wait while a client sends the most expensive input."""

    octets_per_turn: int = 256 * 1024
    """Octets written for one connection before the loop serves the others."""

    replies_per_turn: int = 1000
    """Control frames queued (SETTINGS ACK, PING ACK, RST_STREAM; CVE-2019-9512, -9514, -9515) before they must have
    been written; nothing is read while the transport does not take them. nghttp2, Envoy 1,000; Go, C-core 10,000."""

    high_water: int = 64 * 1024
    """Octets a stream may have queued before its handler is asked to wait (h2 400 KiB, grpc-go 64 KiB)."""

    low_water: int = 16 * 1024
    """Octets at which a waiting handler goes on."""

    preface_timeout: float = 10.0
    """From connecting to the client's preface and SETTINGS (Go 10 s, grpc-go 120 s): bounds silent sockets."""

    header_timeout: float = 10.0
    """From HEADERS to END_HEADERS."""

    stall_timeout: float = 120.0
    """How long a peer may leave every queued octet unread, by TCP or by windows, before it is disconnected. Meanwhile
    the catalogue that it reads cannot be released; nginx 60 s."""

    keepalive_time: float = 7200.0
    """Silence after which a PING checks whether the peer is alive (A8: 2 h)."""

    keepalive_timeout: float = 20.0
    """How long the answer may take (A8: 20 s)."""

    min_ping_interval: float = 300.0
    """PINGs that come faster, with nothing sent by us in between, are strikes (A8: 5 min)."""

    min_ping_interval_idle: float = 7200.0
    """The same while no stream is open (A8: 2 h without calls)."""

    max_ping_strikes: int = 2
    """One strike more ends the connection with ``too_many_pings`` (A8)."""

    max_connection_age: float = inf
    """After which a connection is drained, so that clients of a grown fleet spread anew (A9)."""

    age_jitter: float = 0.1
    """Share by which the age varies, so that connections of one moment do not end in one moment (A9: 10 %)."""

    age_grace: float = inf
    """Time that calls have to finish after the age has been reached (A9)."""

    max_connection_idle: float = inf
    """Without a stream for this long, a connection is drained (A9)."""

    drain_timeout: float = 5.0
    """How long the first GOAWAY's PING may stay unanswered before the second comes (Go 5 s, Java 10, C-core 20)."""
