"""The messages between the master and a worker.

Master to worker: `Configure` (once, first), `Keys`, `Freshness`, `Certificate`, `Publish`, `Peer`, `PeerGone`, `Drain`;
some carry descriptors. Worker to master: `Mapped` (once, first), then `Ready`, sent when the port is open and again
after every swap, `KeysUsed` and `CallsSampled`. A message is one datagram of JSON: messages are rare and small, and
JSON is readable in ``strace``. They arrive in the order in which they are sent.

The reader of a datagram does not trust its writer. `decode` accepts the message types that this end expects, with
exactly their fields, each of exactly its type and within its range. It raises `MessageError` for any other datagram.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, get_type_hints

from definition_server.ipc.stats import METHODS, STATUSES


class MessageError(ValueError):
    """A datagram that is not a message of this protocol."""


@dataclass(frozen=True, slots=True)
class Configure:
    """The configuration of a worker.

    It holds no secrets: keys arrive as digests, in `Keys`. With TLS, the message carries the descriptors of `TlsFiles`.

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
    jail: str = "off"
    """``auto``, ``require`` or ``off``: see the setting ``JAIL``."""
    version_metadata: bool = True
    """Whether the metadata of answers name the catalogue."""
    trace_one_call_in: int = 0
    """One of so many calls is reported by `CallsSampled`; 0: no call is reported."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The accepted keys, as hex SHA-256 digests. They replace the previous ones."""

    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Freshness:
    """Whether the served catalogue is up to date, as far as the master knows."""

    fresh: bool


@dataclass(frozen=True, slots=True)
class Certificate:
    """The TLS files were replaced: use the files whose descriptors this message carries for new connections.

    ``revision`` counts the replacements.
    """

    revision: int


@dataclass(frozen=True, slots=True)
class Publish:
    """A new snapshot. The message carries the descriptor of its sealed memory."""

    generation: int
    version_hash: str


@dataclass(frozen=True, slots=True)
class Peer:
    """Another worker's stats page, for reading. The message carries its descriptor."""

    number: int


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The worker with this number has ended, and accepts no more connections."""

    number: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Drain: report NOT_SERVING if ``announce``, wait, finish calls in flight within ``timeout_seconds``, exit 0."""

    announce: bool
    wait_seconds: float
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Mapped:
    """The worker has mapped its stats page: the master may seal it against any other writer."""


@dataclass(frozen=True, slots=True)
class KeysUsed:
    """Keys with these hex SHA-256 digests were presented since the last such message. Sent at most once a second."""

    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CallsSampled:
    """A sample of the calls that the worker has answered. Sent at most once a second. The lists have one length.

    ``methods`` and ``statuses`` are indices into `ipc.stats.METHODS` and `STATUSES`; ``ended_ns`` are times of
    CLOCK_REALTIME and ``elapsed_ns`` durations, in nanoseconds.
    """

    methods: tuple[int, ...]
    statuses: tuple[int, ...]
    ended_ns: tuple[int, ...]
    elapsed_ns: tuple[int, ...]

    @property
    def plausible(self) -> bool:
        """Whether the lists have the same length, and every index and time is in its range."""
        return (
            len(self.methods) == len(self.statuses) == len(self.ended_ns) == len(self.elapsed_ns)
            and all(index < len(METHODS) for index in self.methods)
            and all(index < len(STATUSES) for index in self.statuses)
            and all(elapsed <= ended for ended, elapsed in zip(self.ended_ns, self.elapsed_ns, strict=True))
        )


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker serves. ``generation`` is that of its snapshot; 0: it has none yet."""

    generation: int
    jail: str = "none"
    """The confinement of the worker: an `Extent` of ``jail/confinement.py``."""


FromMaster = Configure | Keys | Freshness | Certificate | Publish | Peer | PeerGone | Drain
FromWorker = Mapped | Ready | KeysUsed | CallsSampled
Message = FromMaster | FromWorker

FROM_MASTER: tuple[type[Message], ...] = (Configure, Keys, Freshness, Certificate, Publish, Peer, PeerGone, Drain)
FROM_WORKER: tuple[type[Message], ...] = (Mapped, Ready, KeysUsed, CallsSampled)

_MOST_INTEGER = 2**64 - 1
_MOST_TEXT = 4096
_MOST_ITEMS = 256
_SHOWN = 120
"""The most octets of a refused datagram that its error quotes."""


def encode(message: Message) -> bytes:
    """One datagram."""
    return json.dumps({"type": type(message).__name__, **asdict(message)}).encode()


def decode(datagram: bytes, expected: tuple[type[Message], ...]) -> Message:
    """The message in ``datagram``, of one of the ``expected`` types.

    Raises:
        MessageError: if the datagram is not a message of these types. The text quotes its first octets.
    """
    try:
        values = json.loads(datagram, parse_constant=_refuse_constant)
        cls = _class_of(values, expected)
        return cls(**_fields_of(cls, values))
    except (ValueError, RecursionError, OverflowError) as error:
        raise MessageError(f"not a control message: {datagram[:_SHOWN]!r} ({error})") from None


def _class_of(values: object, expected: tuple[type[Message], ...]) -> type[Message]:
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    name = values.pop("type", None)
    for cls in expected:
        if cls.__name__ == name:
            return cls
    raise ValueError("its type is not expected here")


def _fields_of(cls: type[Message], values: dict[str, Any]) -> dict[str, Any]:
    """The checked values of the fields. Every field is required, because both ends have the same version."""
    checks = _CHECKS[cls]
    if values.keys() != checks.keys():
        raise ValueError("its fields are not those of its type")
    return {name: check(values[name]) for name, check in checks.items()}


def _integer(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_INTEGER:
        raise ValueError("a number is not an unsigned 64-bit integer")
    return value


def _real(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a number is not finite")
    return float(value)


def _boolean(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("a value is neither true nor false")
    return value


def _text(value: object) -> str:
    if type(value) is not str or len(value) > _MOST_TEXT:
        raise ValueError("a field that must be a text is not one, or is too long")
    return value


def _list(value: object) -> list[object]:
    if type(value) is not list or len(value) > _MOST_ITEMS:
        raise ValueError("a field that must be a list is not one, or is too long")
    return value


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(_text, _list(value)))


def _integers(value: object) -> tuple[int, ...]:
    return tuple(map(_integer, _list(value)))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


_CHECK_OF: dict[object, Callable[[object], object]] = {
    int: _integer,
    float: _real,
    bool: _boolean,
    str: _text,
    tuple[str, ...]: _texts,
    tuple[int, ...]: _integers,
}


def _checks_of(cls: type[Message]) -> dict[str, Callable[[object], object]]:
    hints = get_type_hints(cls)
    return {field.name: _CHECK_OF[hints[field.name]] for field in fields(cls)}


_CHECKS = {cls: _checks_of(cls) for cls in (*FROM_MASTER, *FROM_WORKER)}
