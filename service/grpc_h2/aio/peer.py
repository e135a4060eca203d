"""The text of a peer's address."""

from __future__ import annotations

from typing import Any


def peer_text(address: Any) -> str:
    """A peer's address as gRPC writes it: see `Http2Protocol.peer`. An IPv4 address that is mapped into IPv6 is written
    as IPv4."""
    if not isinstance(address, tuple) or len(address) < 2:
        return "unix:"
    host, port = address[:2]
    if ":" not in host:
        return f"ipv4:{host}:{port}"
    if host.startswith("::ffff:") and "." in host:
        return f"ipv4:{host[7:]}:{port}"
    return f"ipv6:%5B{host}%5D:{port}"
