"""Imports what the worker's code and its libraries import only when they first need it: a confined worker opens no file.

Some of these are imported inside functions of the standard library or of gRPC. The list was found by trial, and
``tests/integration/test_jail.py`` fails if a worker that serves, drains or fails imports anything after its confinement.
"""

from __future__ import annotations

from importlib import import_module

_EVERY_TRANSPORT = ("threading",)
_TRANSPORT = {
    "native": ("definition_server.data_plane.transports.native",),
    "grpcio": ("definition_server.data_plane.transports.grpcio",),
}


def preload(transport: str) -> None:
    """Import everything that a worker with this transport may need."""
    for name in (*_EVERY_TRANSPORT, *_TRANSPORT[transport]):
        import_module(name)
