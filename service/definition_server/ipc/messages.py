"""The messages between the master and a worker.

Master to worker: `Configure` (once, first), `Keys`, `Certificate`, `Publish` (with a descriptor), `Drain`. Worker to
master: `Ready`, sent when the port is open and again after every swap, and `KeysUsed`. A message is one datagram of
JSON: messages are rare and small, and JSON is readable in ``strace``. They arrive in the order in which they are sent.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


class MessageError(ValueError):
    """A datagram that is not a message of this protocol."""


@dataclass(frozen=True, slots=True)
class Configure:
    """The configuration of a worker. It holds no secrets: keys come as digests by `Keys`, TLS files as paths.

    A limit of 0 means no limit. Times are in seconds.
    """

    host: str
    port: int
    transport: str
    reflection: bool
    max_connection_age_seconds: float
    threadpool_size: int
    app_env: str
    log_level: str
    drain_timeout_seconds: float
    max_connections: int = 0
    max_connections_per_peer: int = 0
    max_connection_idle_seconds: float = 0.0
    keepalive_time_seconds: float = 7200.0
    keepalive_timeout_seconds: float = 20.0
    keepalive_min_time_seconds: float = 10.0
    tls_cert_file: str = ""
    """Empty: no TLS."""
    tls_key_file: str = ""
    tls_client_ca_file: str = ""
    """Empty: clients need no certificate."""
    jail: str = "off"
    """``auto``, ``require`` or ``off``: see the setting ``JAIL``."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The accepted keys, as hex SHA-256 digests. They replace the ones before."""

    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """The TLS files were replaced: read them again for new connections. ``revision`` counts the replacements."""

    revision: int


@dataclass(frozen=True, slots=True)
class Publish:
    """A snapshot. The descriptor of its sealed memory travels beside the message."""

    generation: int
    version_hash: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Drain: report NOT_SERVING if ``announce``, wait, finish calls in flight within ``timeout_seconds``, exit 0."""

    announce: bool
    wait_seconds: float
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class KeysUsed:
    """Keys with these hex SHA-256 digests were presented since the last such message. At most one a second."""

    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker serves; ``generation`` is that of its snapshot, 0 while it has none."""

    generation: int
    jail: str = "none"
    """How far the worker is confined: an `Extent` of ``jail/confinement.py``."""


Message = Configure | Keys | Certificate | Publish | Drain | Ready | KeysUsed

_TYPES: dict[str, type[Message]] = {
    cls.__name__: cls for cls in (Configure, Keys, Certificate, Publish, Drain, Ready, KeysUsed)
}


def encode(message: Message) -> bytes:
    """One datagram."""
    return json.dumps({"type": type(message).__name__, **asdict(message)}).encode()


def decode(datagram: bytes) -> Message:
    """The message in ``datagram``.

    Raises:
        MessageError: where the datagram is not a message.
    """
    try:
        values: dict[str, Any] = json.loads(datagram)
        cls = _TYPES[values.pop("type")]
        if cls in (Keys, KeysUsed):
            return cls(tuple(values["digests"]))
        return cls(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"not a control message: {datagram[:200]!r} ({error})") from error
