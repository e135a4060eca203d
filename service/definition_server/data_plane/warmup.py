"""Warm-up before READY: the first calls of a process are its slowest, so the worker makes them itself.

A temporary server with a key of its own serves the worker's handlers, and every path of a client's
first calls (connection, authentication, found, missing, refused, health) is exercised once. All objects that exist
after these calls live as long as the process, so they are exempted from garbage collection (``gc.freeze``).
"""

from __future__ import annotations

import gc
import logging
import secrets
import socket
import sys
from dataclasses import replace
from hashlib import sha256

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.endpoint import Endpoint
from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.transports import create_transport
from definition_server.data_plane.transports.first_calls import listener_and_client
from definition_server.ipc.messages import Configure
from definition_server.ipc.stats import unshared_slot

_YOUNG_OBJECTS = 5000
"""The number of objects in the youngest generation at which it is collected. Calls on the native transport create no
objects that the collector tracks, but an attacker's streams do: with Python's default of 700 the collector would run
twenty times a second and free nothing (docs/runtime-flags.md)."""
_YOUNG_COLLECTIONS, _MIDDLE_COLLECTIONS = 2, 40
"""The number of collections of the youngest generation before the middle generation is also collected, and the number
of collections of the middle generation before all generations are collected. Python's own values are 10 and 10: the
middle generation then has up to 55,000 objects, which are examined in one pause (26 ms of CPU time with 256 connections
with wrong keys)."""


class WarmUp:
    """The temporary server, in two steps: its sockets are opened before the worker is confined, and the calls are made
    afterwards.
    """

    def __init__(self, config: Configure) -> None:
        """Open the sockets.

        Raises:
            OSError: if no descriptor is left.
        """
        self._config = replace(config, host="127.0.0.1", port=0)
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        if config.transport == "native":
            self._listener, self._client = listener_and_client()
        else:
            self._config = replace(self._config, host=f"unix-abstract:definition-server-{secrets.token_hex(8)}")

    async def run(self) -> None:
        """Exercise the transport, in cleartext, then collect and freeze."""
        key = secrets.token_hex(16)
        engine = DefinitionEngine()
        builder = SnapshotBuilder()
        builder.add([Row(1, b"warm", None, None, b"up")])
        engine.snapshot = Snapshot(builder.build(generation=1, created_at_ns=0).to_bytes())
        endpoint = Endpoint(engine, KeyRing([sha256(key.encode()).hexdigest()]), unshared_slot())
        transport = create_transport(self._config, endpoint, self._listener)
        logging.disable(logging.INFO)  # log lines about clients would be about this process itself
        try:
            await transport.start()
            await transport.set_serving(True)
            await transport.call_all_paths(self._client, key)
        finally:
            await transport.stop(0)
            logging.disable(logging.NOTSET)
        gc.collect()
        gc.freeze()
        if self._config.transport == "native":
            if sys.version_info < (3, 14):  # from Python 3.14 on, the second value is a divisor with another meaning
                gc.set_threshold(_YOUNG_OBJECTS, _YOUNG_COLLECTIONS, _MIDDLE_COLLECTIONS)
            else:
                gc.set_threshold(_YOUNG_OBJECTS)
