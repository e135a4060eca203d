"""Warm-up before READY: the first calls of a process are its slowest, so the worker makes them itself.

A throw-away server with a key of its own serves the worker's handlers on the loopback; every path that a client's
first call would take (connection, authentication, found, missing, refused, health) has then been taken once. What was
allocated until now is then frozen out of the garbage collector's sight: it will live as long as the process.
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
from definition_server.ipc.stats import StatsPage

_YOUNG_OBJECTS = 5000
"""Objects of the youngest generation before they are collected. Calls make none on the native transport; an attacker's
streams do, and by Python's 700 (2,000 from 3.14 on) they are collected, and kept, twenty times a second
(docs/runtime-flags.md)."""


async def warm_up(config: Configure) -> None:
    """Exercise the transport that ``config`` names, in cleartext, then collect and freeze."""
    key = secrets.token_hex(16)
    page = StatsPage.create(1)
    engine = DefinitionEngine()
    builder = SnapshotBuilder()
    builder.add([Row(1, b"warm", None, None, b"up")])
    engine.snapshot = Snapshot(builder.build(generation=1, created_at_ns=0).to_bytes())
    endpoint = Endpoint(engine, KeyRing([sha256(key.encode()).hexdigest()]), page.slot(0))
    transport = create_transport(replace(config, host="127.0.0.1", port=0, tls_cert_file=""), endpoint)
    try:
        port = await transport.start()
        await transport.set_serving(True)
        await transport.call_all_paths(port, key)
    finally:
        await transport.stop(0)
        page.close()
    gc.collect()
    gc.freeze()
    if config.transport == "native":
        gc.set_threshold(_YOUNG_OBJECTS)
