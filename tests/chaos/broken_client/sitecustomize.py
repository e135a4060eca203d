"""Servers with a deliberate defect, to show that a client drill can fail; only tests put this on ``PYTHONPATH``.

Python imports it when a process starts. ``PYTHON_DRILL_BROKEN`` names the variant; workers inherit ``PYTHON…``.
"""

from __future__ import annotations

import os
import time
from typing import Any


def evicts_the_oldest() -> None:
    """Reduces load by closing the oldest connections."""
    from grpc_h2 import Server

    connected, held = Server.connected, []

    def evict(self: Any, protocol: Any) -> None:
        connected(self, protocol)
        held.append(protocol)
        if len(held) > 400:
            held.pop(0).abort()

    Server.connected = evict


def keeps_every_connection() -> None:
    """Leaks the memory of each connection."""
    from grpc_h2 import Server

    connected, kept = Server.connected, []

    def keep(self: Any, protocol: Any) -> None:
        connected(self, protocol)
        kept.append(b"%d" % id(protocol) * 2000)

    Server.connected = keep


def waits_for_slow_readers() -> None:
    """Blocks all clients until a full buffer has room."""
    from grpc_h2 import Http2Protocol

    pause = Http2Protocol.pause_writing

    def pause_writing(self: Any) -> None:
        pause(self)
        time.sleep(6)  # the defect

    Http2Protocol.pause_writing = pause_writing


def dies_of_a_reset() -> None:
    """Does not handle a connection that ends with an error."""
    from grpc_h2 import Http2Protocol

    lost = Http2Protocol.connection_lost

    def connection_lost(self: Any, exc: Exception | None) -> None:
        lost(self, exc)
        if exc is not None:
            os._exit(1)

    Http2Protocol.connection_lost = connection_lost


def dies_of_an_attack() -> None:
    """Has no limits for attackers."""
    from grpc_h2 import Http2Protocol

    log_closing = Http2Protocol._log_closing

    def log_and_die(self: Any, event: Any) -> None:
        log_closing(self, event)
        if event.code:
            os._exit(1)

    Http2Protocol._log_closing = log_and_die


def makes_all_wait_for_wrong_keys() -> None:
    """Answers a wrong key late, and so delays all other answers."""
    from definition_server.data_plane.authentication import KeyRing

    authenticate = KeyRing.authenticate

    def authenticate_slowly(self: Any, metadata: Any) -> None:
        try:
            authenticate(self, metadata)
        except Exception:
            time.sleep(0.5)  # the defect
            raise

    KeyRing.authenticate = authenticate_slowly


def lets_wrong_keys_in() -> None:
    """Accepts one wrong key in a hundred."""
    from definition_server.data_plane.authentication import KeyRing

    authenticate, refused = KeyRing.authenticate, 0

    def authenticate_mostly(self: Any, metadata: Any) -> None:
        nonlocal refused
        try:
            authenticate(self, metadata)
        except Exception:
            refused += 1
            if refused % 100:
                raise

    KeyRing.authenticate = authenticate_mostly


VARIANTS = {
    "evicts-the-oldest": evicts_the_oldest,
    "keeps-every-connection": keeps_every_connection,
    "waits-for-slow-readers": waits_for_slow_readers,
    "dies-of-a-reset": dies_of_a_reset,
    "dies-of-an-attack": dies_of_an_attack,
    "makes-all-wait-for-wrong-keys": makes_all_wait_for_wrong_keys,
    "lets-wrong-keys-in": lets_wrong_keys_in,
}

if __name__ == "sitecustomize" and (variant := os.environ.get("PYTHON_DRILL_BROKEN")):
    VARIANTS[variant]()
