"""Shows several servers in one table: the catalogue that each serves and since when. The requests go over HTTP to their
metrics ports, without a key.

A name, such as that of a headless service, may have several addresses; each is a replica. A replica that does not
answer, or sends an unexpected answer, also has a row. The answers are not trusted: their size, their duration and the
types in them are checked.
"""

from __future__ import annotations

import http.client
import json
import queue
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import click

from definition_server.cli.control_output import brief, print_table
from definition_server.cli.exits import CommandFailed, Exit, on_terminal, print_json, visible

Result = TypeVar("Result")

METRICS_PORT = 9464
"""The port of a target that names none."""
_LARGEST_ANSWER = 4 * 1024 * 1024
_MOST_REPLICAS = 256
_SHOWN_REPLICAS = 5
_WIDE = 110
"""The fewest columns of a terminal on which host names are shown."""
_TARGET = re.compile(
    r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([\w.-]+))(?::([0-9]{1,5}))?|([0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)"
)


@dataclass(frozen=True, slots=True)
class Address:
    """An address at which a replica may be."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Replica:
    """The state of one replica, as far as it is known."""

    at: str
    """The replica's address, or a name for which there is no address."""
    error: str | None = None
    """The reason why the other fields are unknown; None if the replica has answered."""
    hostname: str = ""
    started_at: str = ""
    server_version: str = ""
    version_hash: str | None = None
    """None: the replica serves no catalogue yet, or its state is unknown."""
    definitions: int = 0
    since: str | None = None
    """The time since which the version is served, in ISO 8601."""
    ready: bool = False
    stopping: bool = False
    fresh: bool = False
    stale_reason: str | None = None
    held: bool = False
    pinned: bool = False
    differs: bool = False
    """Whether this replica serves another version than most replicas."""

    @property
    def good(self) -> bool:
        """Whether the replica is ready and fresh, and serves the same version as the others."""
        return self.ready and self.fresh and not self.differs

    @property
    def state(self) -> str:
        """The state in a few words."""
        if self.error is not None:
            return self.error
        words = ["stopping" if self.stopping else "ready" if self.ready else "not ready"]
        words += ["catalogue held"] * self.held + ["pinned"] * self.pinned + ["differs"] * self.differs
        return ", ".join(words)


def parse_target(text: str) -> Address:
    """``HOST``, ``HOST:PORT``, ``[IPv6]:PORT`` or a bare IPv6 address.

    Raises:
        click.UsageError: if the text has another form.
    """
    found = _TARGET.fullmatch(text)
    port = METRICS_PORT if found is None or found[3] is None else int(found[3])
    if found is None or not 0 < port < 65_536:
        raise click.UsageError(f"{visible(text)!r} is not HOST or HOST:PORT of a metrics port.")
    return Address(found[1] or found[2] or found[4], port)


def show_fleet(targets: Sequence[str], timeout: float, *, as_json: bool) -> None:
    """Ask every replica of ``targets``, and print one table, or JSON.

    Raises:
        CommandFailed: if a replica differs, is not ready, not fresh or does not answer.
    """
    replicas = ask([parse_target(target) for target in targets], timeout)
    versions = Counter(replica.version_hash for replica in replicas if replica.version_hash)
    if as_json:
        print_json({
            "replicas": [_document(replica) for replica in replicas],
            "versions": dict(versions.most_common()),
            "good": all(replica.good for replica in replicas),
        })  # fmt: skip
    else:
        _print_table(replicas)
    _judge(replicas, versions)


def _print_table(replicas: Sequence[Replica]) -> None:
    """At a terminal hashes are shortened, and host names are shown if there is room. Lines in a pipe are complete."""
    terminal = on_terminal()
    hash_of = brief if terminal else str
    with_host = not terminal or shutil.get_terminal_size().columns >= _WIDE
    columns = ("replica", "version", "since", "fresh", "state", "host")
    rows = [
        (
            replica.at,
            hash_of(replica.version_hash or "-"),
            _seconds(replica.since),
            "-" if replica.error is not None else "yes" if replica.fresh else replica.stale_reason or "no",
            replica.state,
            replica.hostname or "-",
        )
        for replica in replicas
    ]
    shown = len(columns) if with_host else len(columns) - 1
    print_table(None, columns[:shown], [row[:shown] for row in rows])


def _judge(replicas: Sequence[Replica], versions: Counter[str]) -> None:
    if all(replica.error is not None for replica in replicas):
        raise CommandFailed(
            "no replica answers. The request goes to the metrics port of HOST: 9464, or HOST:PORT", Exit.UNAVAILABLE
        )
    faults = []
    if len(versions) > 1:
        served = "; ".join(
            f"{brief(version)} by {_names(replica for replica in replicas if replica.version_hash == version)}"
            for version, _ in versions.most_common()
        )
        faults.append(f"the replicas serve {len(versions)} versions: {served}")
    for words, found in (
        ("do not answer", [each for each in replicas if each.error is not None]),
        ("are not ready", [each for each in replicas if each.error is None and not each.ready]),
        ("are not fresh", [each for each in replicas if each.error is None and not each.fresh]),
    ):
        if found:
            faults.append(f"{len(found)} of {len(replicas)} {words}: {_names(found)}")
    if faults:
        raise CommandFailed(". ".join(faults), Exit.FAILED)


def _names(replicas: Iterable[Replica]) -> str:
    names = [visible(replica.at) for replica in replicas]
    more = len(names) - _SHOWN_REPLICAS
    return ", ".join(names[:_SHOWN_REPLICAS]) + (f" and {more} more" if more > 0 else "")


def _document(replica: Replica) -> dict[str, object]:
    return {
        "replica": replica.at,
        "hostname": replica.hostname,
        "error": replica.error,
        "server_version": replica.server_version,
        "version_hash": replica.version_hash,
        "definitions": replica.definitions,
        "since": replica.since,
        "ready": replica.ready,
        "fresh": replica.fresh,
        "freshness_reason": replica.stale_reason,
        "state": replica.state,
        "differs": replica.differs,
    }


def _seconds(instant: str | None) -> str:
    """An instant of ``/statusz`` without fractions of seconds."""
    return "-" if instant is None else re.sub(r"(\.[0-9]+)?\+00:00$", "Z", instant)


# -- requests --------------------------------------------------------------------------------------------------------


def ask(targets: Sequence[Address], timeout: float) -> list[Replica]:
    """The replicas at ``targets``, in the same order. ``timeout``: seconds for the whole function."""
    deadline = time.monotonic() + timeout
    found: list[list[Address] | Replica] = _side_by_side(
        [partial(_addresses, target) for target in targets],
        timeout / 2,
        lambda number: Replica(str(targets[number]), "the name service does not answer"),
    )
    addresses = [each for each in found if not isinstance(each, Replica)]
    unique = list(dict.fromkeys(address for group in addresses for address in group))[:_MOST_REPLICAS]
    left = max(0.1, deadline - time.monotonic())
    answers = dict(
        zip(
            unique,
            _side_by_side(
                [partial(_status_of, address, left) for address in unique],
                left,
                lambda number: Replica(str(unique[number]), "no answer in time"),
            ),
            strict=True,
        )
    )
    replicas: list[Replica] = []
    for each in found:
        if isinstance(each, Replica):
            replicas.append(each)
        else:
            asked = [address for address in each if address in answers]
            replicas += _of_one_name([answers[address] for address in asked], asked)
    return _compared(_once(replicas))


def _side_by_side(work: Sequence[Callable[[], Result]], timeout: float, late: Callable[[int], Result]) -> list[Result]:
    """Call each function of ``work`` in a thread of its own. Returns the results; ``late`` supplies the result of a
    function that has not returned within ``timeout`` seconds.
    """
    results: queue.SimpleQueue[tuple[int, Result]] = queue.SimpleQueue()

    def run(number: int) -> None:
        results.put((number, work[number]()))

    for number in range(len(work)):
        threading.Thread(target=run, args=(number,), daemon=True).start()
    done: dict[int, Result] = {}
    deadline = time.monotonic() + timeout
    while len(done) < len(work):
        try:
            number, result = results.get(timeout=max(0.001, deadline - time.monotonic()))
        except queue.Empty:
            break
        done[number] = result
    return [done[number] if number in done else late(number) for number in range(len(work))]


def _addresses(target: Address) -> list[Address] | Replica:
    try:
        entries = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a valid name"
        return Replica(str(target), f"the name cannot be resolved: {reason}")
    return list(dict.fromkeys(Address(str(entry[4][0]), target.port) for entry in entries))


def _of_one_name(replicas: list[Replica], addresses: list[Address]) -> list[Replica]:
    """The replicas at the addresses of one name. If only one of IPv4 and IPv6 answers, the addresses of the other are
    left out: the servers do not listen on it.
    """
    by_family: dict[bool, list[Replica]] = {True: [], False: []}
    for replica, address in zip(replicas, addresses, strict=True):
        by_family[":" in address.host].append(replica)
    answering = [group for group in by_family.values() if any(replica.error is None for replica in group)]
    return [replica for group in answering or by_family.values() for replica in group]


def _once(replicas: Iterable[Replica]) -> list[Replica]:
    """``replicas`` with each process only once, because a process may have several addresses and names."""
    found: dict[object, Replica] = {}
    for replica in replicas:
        known = replica.error is None and replica.hostname
        found.setdefault((replica.hostname, replica.started_at) if known else replica.at, replica)
    return list(found.values())


def _compared(replicas: list[Replica]) -> list[Replica]:
    """``replicas``, with `differs` set for each that does not serve the version that most serve. If two versions are
    served equally often, the version that was published last is used."""
    counts = Counter(replica.version_hash for replica in replicas if replica.version_hash)
    if len(counts) < 2:
        return replicas
    latest = {version: max(r.since or "" for r in replicas if r.version_hash == version) for version in counts}
    usual = max(counts, key=lambda version: (counts[version], latest[version]))
    return [replace(each, differs=each.version_hash not in (None, usual)) for each in replicas]


def _status_of(address: Address, timeout: float) -> Replica:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout)
    try:
        connection.request("GET", "/statusz?format=json", headers={"Accept": "application/json"})
        answer = connection.getresponse()
        octets = answer.read(_LARGEST_ANSWER + 1)
        if answer.status != 200 or len(octets) > _LARGEST_ANSWER:
            return Replica(str(address), f"no definition server: HTTP status {answer.status}")
        return _read(address, json.loads(octets))
    except TimeoutError:
        return Replica(str(address), "no answer in time")
    except OSError as error:
        return Replica(str(address), error.strerror or "the connection broke")
    except (http.client.HTTPException, ValueError, RecursionError, TypeError, KeyError):
        return Replica(str(address), "no definition server: it answers something else")
    finally:
        connection.close()


def _read(address: Address, document: Any) -> Replica:
    """A document of ``/statusz``.

    Raises:
        TypeError, KeyError, ValueError: if the document has another form.
    """
    catalog, sync, freshness = document["catalog"], document["sync"], document["freshness"]
    return Replica(
        str(address),
        hostname=_text(document.get("hostname", "")),
        started_at=_text(document["started_at"]),
        server_version=_text(document["version"]),
        version_hash=None if catalog is None else _text(catalog["version_hash"]),
        definitions=0 if catalog is None else int(catalog["definitions"]),
        since=None if catalog is None else _text(catalog.get("published_at") or catalog["created_at"]),
        ready=document["ready"] is True,
        stopping=document["stopping"] is True,
        fresh=freshness["fresh"] is True,
        stale_reason=None if freshness["reason"] is None else _text(freshness["reason"]),
        held=sync["held_reason"] is not None,
        pinned=sync["pinned"] is not None,
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256:
        raise TypeError
    return value
