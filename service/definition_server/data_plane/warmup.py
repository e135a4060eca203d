"""Warm-up before READY: the first calls of a process are its slowest, so the worker makes them itself.

A temporary server with a key of its own serves the worker's handlers on the loopback, and every path of a client's
first calls (connection, authentication, found, missing, refused, health) is exercised once. All objects that exist
then will live as long as the process, so they are moved out of the garbage collector's reach (``gc.freeze``).
"""

from __future__ import annotations

import gc
import secrets
from dataclasses import replace
from hashlib import sha256

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.endpoint import Endpoint
from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.transports import create_transport
from definition_server.ipc.messages import Configure
from definition_server.ipc.stats import unshared_slot

_YOUNG_OBJECTS = 5000
"""Objects of the youngest generation before it is collected. Calls on the native transport create none. An attacker's
streams do: with Python's default of 700 the collector would run twenty times a second and free nothing
(docs/runtime-flags.md)."""


async def warm_up(config: Configure) -> None:
    """Exercise the transport that ``config`` names, in cleartext, then collect and freeze."""
    key = secrets.token_hex(16)
    engine = DefinitionEngine()
    builder = SnapshotBuilder()
    builder.add([Row(1, b"warm", None, None, b"up")])
    engine.snapshot = Snapshot(builder.build(generation=1, created_at_ns=0).to_bytes())
    endpoint = Endpoint(engine, KeyRing([sha256(key.encode()).hexdigest()]), unshared_slot())
    transport = create_transport(replace(config, host="127.0.0.1", port=0, tls_cert_file=""), endpoint)
    try:
        port = await transport.start()
        await transport.set_serving(True)
        await transport.call_all_paths(port, key)
    finally:
        await transport.stop(0)
    gc.collect()
    gc.freeze()
    if config.transport == "native":
        gc.set_threshold(_YOUNG_OBJECTS)
