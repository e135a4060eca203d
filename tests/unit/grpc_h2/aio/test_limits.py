"""States the limits and times of the engine's asyncio part. Other tests import them, so they would accept any value.

The module of each value gives the reason for it. A changed value must be changed here, too.
"""

from __future__ import annotations

from tests.support.stated import deviations

KIB, MIB = 1024, 1024 * 1024

STATED: dict[str, dict[str, object]] = {
    "arrival": {
        "_READ": 4 * KIB,
    },
    "tls_transport": {
        "_RECORD": 16 * KIB,
    },
    "admission": {
        "RESERVE": 64,
        "RESERVE_SECONDS": 2.0,
        "_IDLE_SECONDS": 1.0,
        "_EXAMINED": 64,
        "_SWEEP_SECONDS": 1.0,
        "_KNOWN_NETWORKS": 4 * KIB,
        "Trust.STRANGER": 0,
        "Trust.PROBE": 1,
        "Trust.CLIENT": 2,
        "Refusal.PEER_LIMIT": 0,
        "Refusal.FULL": 1,
        "Refusal.EVICTED": 2,
        "Refusal.NO_CALL": 3,
    },
    "call": {"_GZIP": 2, "_FOREVER": 10000000.0},
    "client_hello": {"_RECORD": 5, "_HANDSHAKE": 22, "_CLIENT_HELLO": 1, "_ALPN": 16},
    "foreign": {"_MOST": 4 * KIB, "recognise(whole)": False},
    "handshakes": {"MOST": 512},
    "key_updates": {"MOST": 4, "_HANDSHAKE": 22, "_KEY_UPDATE": 24},
    "lingering_close": {"LINGER": 1.0, "OCTETS": 2 * MIB, "_OCTETS_OF_A_FLOOD": 64 * KIB, "_PAUSE": 0.01},
    "listener": {"_PAUSE": 0.1, "ACCEPT_SLICE": 0.0001, "_PEEKED": 16 * KIB},
    "listening_options": {"_RECEIVE_BUFFER": 128 * KIB, "_KEEPALIVE_SECONDS": 60},
    "piecewise_tls": {"PIECE": 1024, "TIME_SLICE": 0.0001, "PiecewiseTls.read(len)": 1024},
    "protocol": {
        "_STREAMS_RELEASED_AT_ONCE": 32,
        "_LARGE_READ": 16 * KIB,
        "_EARLY_READS": 8,
        "Http2Protocol.__init__(returning)": False,
    },
    "rate_limited_log": {"BURST": 20, "PER_SECOND": 2.0, "REPORT_SECONDS": 10.0},
    "scheduler": {
        "TIME_SLICE": 3e-05,
        "RETURNING_SLICE": 0.0002,
        "RETURNING_LARGE": 3,
        "BUSY_LIMIT": 6e-05,
        "CLAIMS": 4,
        "SETUPS": 1,
        "Share.ARRIVALS": 0,
        "Share.CLIENTS": 1,
        "Share.STRANGERS": 2,
        "Share.RETURNING": 3,
    },
    "server": {"_UNWINDING": 1.0, "_STALL_CHECK_SECONDS": 1.0, "_FIRST_CALL": 0.1},
    "stalled": {"STALL_SECONDS": 5.0},
    "tls": {"TlsCredentials.__init__(require_client_certificate)": True},
}
"""Module → name → value."""


def test_the_numbers_of_each_module_equal_the_stated_ones() -> None:
    assert deviations("grpc_h2.aio", STATED) == []
