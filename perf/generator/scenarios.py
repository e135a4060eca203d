"""Scenarios as data: the load that is offered to a server. The head of ``scenarios.toml`` describes the keys."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "scenarios.toml"

KINDS = ("closed", "open", "sync", "idle", "publish", "slow-reader")
SETS = ("quick", "standard", "full")
"""Each set contains those before it."""
NAMES = ("one", "all", "zipf")
GENERATORS = ("own", "h2load")
SATURATE = "saturate"
PURE, COMPILED = "native", "compiled"
"""The native transport with the pure engine, which the gates judge, and with the compiled one."""
OURS = (PURE, "grpcio")
"""Our own two transports."""
WORKERS = (PURE, COMPILED, "grpcio")
"""The servers that are workers of ours."""
CONTRACT = (*WORKERS, "grpc-js", "grpc-go", "tonic", "grpcio-aio", "grpcio-sync")
"""Every server that implements the contract."""
YARDSTICKS = ("nghttpd", "nginx")
"""Servers in C, which send files."""
SERVERS = (*CONTRACT, *YARDSTICKS)
"""Every server, in the order of table columns, bars and colours."""
ALL = "all"
"""In the file: every server that implements the contract."""


class ScenarioError(ValueError):
    """The file is not valid; the text names the place and a remedy."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of load. Rates are calls per second and core of the server; times are in seconds."""

    name: str
    title: str
    why: str
    kind: str
    connections: int = 8
    streams: int = 32
    """Calls in flight on each connection, in a closed loop."""
    rate: float | str = 0.0
    """Rate of calls that are offered on a schedule, or ``saturate``: in steps, up to the server's limit and beyond. 0:
    a closed loop."""
    definitions: int = 1000
    answer_octets: int = 1500
    names: str = "all"
    """Which definitions are requested: ``one``, ``all`` in turn, or ``zipf``: a few of them often."""
    unknown: float = 0.0
    """Share of calls for unknown names."""
    bad_key: float = 0.0
    """Share of calls with a wrong key."""
    deadlines: bool = False
    """A fresh ``grpc-timeout`` in every call."""
    tls: bool = False
    idle: int = 0
    """The number of idle connections in addition to the load."""
    publications: int = 0
    """Number of catalogues published during the calls."""
    generator: str = "own"
    """``own``, or ``h2load`` for servers that do not implement the contract, and servers compared with them."""
    seconds: float = 2.0
    sets: tuple[str, ...] = field(default=("full",))
    servers: tuple[str, ...] = CONTRACT

    def __post_init__(self) -> None:
        self._one_of("kind", self.kind, KINDS)
        self._one_of("names", self.names, NAMES)
        self._one_of("generator", self.generator, GENERATORS)
        for key, allowed in (("sets", SETS), ("servers", SERVERS)):
            for value in getattr(self, key):
                self._one_of(key, value, allowed)
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
                raise ScenarioError(f"scenario {self.name}: {key} = {value!r}, but it must be at least {least}")
        if isinstance(self.rate, str) and self.rate != SATURATE:
            raise ScenarioError(f"scenario {self.name}: rate = {self.rate!r}, but it must be a number or {SATURATE!r}")
        if self.kind == "open" and not self.rate:
            raise ScenarioError(f"scenario {self.name}: an open loop needs a rate")
        if self.kind == "publish" and not (self.rate and self.publications):
            raise ScenarioError(f"scenario {self.name}: kind publish needs a rate and publications")
        if self.unknown + self.bad_key > 1:
            raise ScenarioError(f"scenario {self.name}: unknown and bad_key together exceed 1")

    def _one_of(self, key: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ScenarioError(f"scenario {self.name}: {key} = {value!r} is not one of {', '.join(allowed)}")

    @property
    def known(self) -> float:
        """Share of calls that are answered with a definition."""
        return 1.0 - self.unknown - self.bad_key


_LEAST: Mapping[str, float] = {
    "connections": 1, "streams": 1, "definitions": 1, "answer_octets": 200, "seconds": 0.1,
    "unknown": 0, "bad_key": 0, "idle": 0, "publications": 0,
}  # fmt: skip
_KEYS = {each.name for each in fields(Scenario)} | {"each"}
_NEEDED = ("name", "title", "why", "kind")


def load(path: Path = FILE) -> dict[str, Scenario]:
    """All scenarios by name, in the order of the file.

    Raises:
        ScenarioError: if the file cannot be read, or is not valid.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ScenarioError(f"{path.name}: {error}") from error
    if set(tables) != {"scenario"}:
        raise ScenarioError(f"{path.name}: only [[scenario]] tables are allowed, found {', '.join(sorted(tables))}")
    found: dict[str, Scenario] = {}
    for table in tables["scenario"]:
        for scenario in _scenarios(table, path.name):
            if scenario.name in found:
                raise ScenarioError(f"{path.name}: scenario {scenario.name} is defined twice")
            found[scenario.name] = scenario
    return found


def _scenarios(table: dict[str, Any], file: str) -> list[Scenario]:
    """The scenarios of one table: one, or one for each value of ``each``."""
    name = table.get("name", "?")
    if unknown := sorted(set(table) - _KEYS):
        known = ", ".join(sorted(_KEYS))
        raise ScenarioError(f"{file}: scenario {name}: unknown key {', '.join(unknown)}; known are {known}")
    if missing := [key for key in _NEEDED if key not in table]:
        raise ScenarioError(f"{file}: scenario {name}: {', '.join(missing)} is missing")
    values = {key: value for key, value in table.items() if key != "each"}
    servers = values.get("servers", ALL)
    values["servers"] = CONTRACT if servers == ALL else _words(servers, name, "servers")
    values["sets"] = _words(values.get("sets", ["full"]), name, "sets")
    each = table.get("each", {})
    if not each:
        return [Scenario(**values)]
    if len(each) != 1 or not set(each) <= _KEYS:
        raise ScenarioError(f"{file}: scenario {name}: each takes one key with a list of values")
    ((key, variants),) = each.items()
    first = Scenario(**values)
    return [
        replace(first, name=f"{name}-{value}", title=f"{first.title}: {value:,}", **{key: value}) for value in variants
    ]


def _words(value: Any, name: str, key: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ScenarioError(f"scenario {name}: {key} takes a list of names")
    return tuple(value)


def chosen(scenarios: Mapping[str, Scenario], which: str, only: Iterable[str] = ()) -> list[Scenario]:
    """The scenarios of the set ``which``; with ``only``, those of any set whose name contains one of these words.

    Raises:
        ScenarioError: if no scenario's name contains one of the words.
    """
    words = list(only)
    for word in words:
        if not any(word in name for name in scenarios):
            raise ScenarioError(f"no scenario is called {word}; there are {', '.join(scenarios)}")
    if words:
        return [each for name, each in scenarios.items() if any(word in name for word in words)]
    return [each for each in scenarios.values() if which in each.sets]
