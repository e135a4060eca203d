"""Imports the modules that a worker would otherwise import later, because a confined worker cannot open files.

The list was found by experiment: ``tests/integration/test_jail.py`` fails if a worker that serves, logs an exception,
reloads or drains imports a module after its confinement.
"""

from __future__ import annotations

from importlib import import_module

from definition_server.ipc.messages import Configure

_EVERY_TRANSPORT = ("threading",)
_TRANSPORT = {
    "native": ("definition_server.data_plane.transports.native",),
    "grpcio": ("definition_server.data_plane.transports.grpcio", "grpc._utilities"),
}
_REFLECTION = ("definition_server.data_plane.reflection", "grpc._utilities")


def preload(config: Configure) -> None:
    """Import all modules that a worker with this configuration may need."""
    for name in (*_EVERY_TRANSPORT, *_TRANSPORT[config.transport], *(_REFLECTION if config.reflection else ())):
        import_module(name)
