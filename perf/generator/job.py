"""The job of a generator process, and its calls, which are drawn before the measurement begins."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import accumulate

from tests.support import wire

from definition_server.catalog.snapshot import Snapshot
from perf.generator.answers import Call, Expected
from perf.targets.catalogue import name_of

NOT_FOUND, UNAUTHENTICATED = 5, 16
WRONG_KEY = "wrong-0123456789abcde"
ZIPF_EXPONENT = 1.1
"""Exponent of Zipf's law. Of 100,000 definitions, the hundred that are requested most often get 57 % of all calls."""
UNKNOWN_NAMES = 20_000
_MOST_CALLS = 1 << 17
"""The number of calls that are drawn and then repeated: too many for a server to exploit the repetition, and few enough
to hold them in memory with their answers."""


@dataclass
class Job:
    """The job of one process of a generator. Times are in seconds."""

    kind: str
    """``closed``, ``open`` or ``sync``."""
    port: int
    pids: list[int] = field(default_factory=list)
    """The process ids of the server."""
    server_cpus: list[int] = field(default_factory=list)
    snapshot: int = -1
    """An inherited descriptor of sealed memory that holds the served catalogue."""
    key: str = ""
    names: str = "all"
    """``one``, ``all`` in turn, or ``zipf``."""
    spread: int = 0
    """Maximum number of definitions, spread over the catalogue; 0 for all."""
    unknown: float = 0.0
    unknown_names: int = UNKNOWN_NAMES
    bad_key: float = 0.0
    deadlines: int = 0
    """Number of different deadlines; 0 if calls have no deadline."""
    acknowledge: bool = False
    """See `perf.generator.connection.LoadConnection`."""
    tls: bool = False
    stamped: bool = False
    """Latency from the instant of sending to the arrival of the answer in the kernel, so that delays of the generator
    itself do not count. See `perf.generator.connection.LoadConnection`."""
    connections: int = 8
    streams: int = 32
    rate: float = 0.0
    seconds: float = 2.0
    warmup: float = 0.4
    patience: float = 10.0
    """The time for which the generator waits for an answer before the run fails."""
    idle: int = 0
    """The number of idle connections in addition to the load."""
    slow: int = 0
    """The number of connections, in addition to the load, that read catalogues slowly."""
    attack: str = ""
    """One of `tests.support.attacks.ATTACKS`, made in the same loop."""
    member: int = 0
    """The number of this process among the generator's processes; process 0 also reads the server's CPU time."""

    def fields(self, path: bytes, *, wrong_key: bool = False, fresh: bool = False) -> list[wire.Field]:
        """The header fields of a call."""
        key = WRONG_KEY if wrong_key else self.key
        scheme = b"https" if self.tls else b"http"
        return wire.call_fields(b"127.0.0.1:%d" % self.port, path, key.encode(), fresh=fresh, scheme=scheme)

    def blocks(self) -> wire.BlockCycle:
        """The header blocks of the usual calls."""
        return wire.BlockCycle(self.fields(wire.GET_COMMAND, wrong_key=self.bad_key >= 1, fresh=self.deadlines > 0))

    def calls(self, snapshot: Snapshot) -> list[Call]:
        """The calls to make in turn, in the requested shares.

        Raises:
            ValueError: if the catalogue does not fit the job.
        """
        names = _names(snapshot.count, self.names, self.spread)
        if self.names != "zipf" and not self.unknown and not self.bad_key:
            return [_known(name, snapshot) for name in names[:_MOST_CALLS]]
        # Every process makes the same shuffle, so that all processes request the same definitions most often.
        random.Random(1).shuffle(names)
        chance = random.Random(100 + self.member)
        count = _MOST_CALLS if self.names == "zipf" else max(1 << 14, min(len(names), _MOST_CALLS))
        unknown, bad = (round(share * count) for share in (self.unknown, self.bad_key))
        calls = self._unknown(unknown, snapshot) + self._bad(bad, names) if unknown or bad else []
        calls += _drawn(count - len(calls), names, self.names == "zipf", snapshot, chance)
        chance.shuffle(calls)
        return calls

    def _unknown(self, count: int, snapshot: Snapshot) -> list[Call]:
        made = []
        for number in range(min(count, self.unknown_names)):
            name = f"missing{number:05d}"
            if name.encode() in snapshot:
                raise ValueError(f"{name} is in the catalogue, but must be unknown")
            text = f"Command '{name}' not found".encode()
            made.append(Call(wire.command_request(name.encode()), Expected(NOT_FOUND, text)))
        return [made[number % len(made)] for number in range(count)]

    def _bad(self, count: int, names: list[str]) -> list[Call]:
        """Calls with a wrong key. Unless all calls have a wrong key, these use their own header block."""
        usual = self.bad_key >= 1
        block = b"" if usual else wire.literal_block(self.fields(wire.GET_COMMAND, wrong_key=True))
        expected = Expected(UNAUTHENTICATED, b"Invalid Credentials")
        made = [Call(wire.command_request(name.encode()), expected, block) for name in names[:count]]
        return [made[number % len(made)] for number in range(count)]


def _names(count: int, which: str, spread: int) -> list[str]:
    if which == "one":
        return [name_of(0)]
    step = max(1, count // spread) if spread else 1
    return [name_of(number) for number in range(0, count, step)][: spread or None]


def _known(name: str, snapshot: Snapshot) -> Call:
    answer = snapshot.answer(name.encode())
    if answer is None:
        raise ValueError(f"{name} is not in the catalogue")
    return Call(wire.command_request(name.encode()), Expected(0, answer))


def _drawn(count: int, names: list[str], zipf: bool, snapshot: Snapshot, chance: random.Random) -> list[Call]:
    """``count`` calls for definitions: by Zipf's law, or all in turn."""
    if zipf:
        weights = list(accumulate((rank + 1) ** -ZIPF_EXPONENT for rank in range(len(names))))
        wanted = chance.choices(names, cum_weights=weights, k=count)
    else:
        wanted = [names[number % len(names)] for number in range(count)]
    made = {name: _known(name, snapshot) for name in dict.fromkeys(wanted)}
    return [made[name] for name in wanted]
