"""The parts of a connection URL: where the database is, and which of the parts may be shown. Opens no connection.

**Secrets.** The texts of libpq and of the server quote their input: ``invalid percent-encoded token: "S3%cret"``. Two
rules keep secrets out of logs. A URL that cannot be parsed is described by fixed texts of ours (`parse_fault`), because
any part of it may be a piece of the password. Every other text passes through `Redaction.clean`, which masks the values
of all parameters but a few.

**Hosts.** libpq and psycopg give each host of a list the whole of ``connect_timeout``. `shares` divides the time
between them, so that a host that does not answer leaves time for the others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import quote

Item = TypeVar("Item")

MASK = "********"
_LIBPQ_PORT = "5432"
"""The port of a host for which the list of ports has no entry."""

_SHOWN = ("host", "hostaddr", "port", "user", "dbname")
_NUMBERS = (
    "connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout",
    "sslcompression", "sslsni", "gssdelegation",
)  # fmt: skip
_CHOICES = (
    "sslmode", "sslnegotiation", "channel_binding", "gssencmode", "target_session_attrs", "load_balance_hosts",
    "ssl_min_protocol_version", "ssl_max_protocol_version", "krbsrvname", "client_encoding", "sslrootcert",
)  # fmt: skip
_FILES = ("sslcert", "sslkey", "sslrootcert", "sslcrl", "sslcrldir", "passfile", "sslkeylogfile")
_CHOSEN = re.compile(
    "disable|allow|prefer|require|verify-ca|verify-full|postgres|direct|any|read-write|read-only|primary|standby|"
    "prefer-standby|random|system|utf8|TLSv1(\\.[0-3])?",
    re.IGNORECASE,
)


def _harmless(name: str, value: str) -> bool:
    """Whether a parameter may be shown. It may if its value has the form that the parameter requires, because then the
    value is not a misplaced secret.
    """
    return (
        name in _SHOWN
        or (name in _NUMBERS and value.isdigit())
        or (name in _CHOICES and _CHOSEN.fullmatch(value) is not None)
        or (name in _FILES and value.startswith("/"))
    )


_SHORT_SECRET = 6
"""A secret of fewer characters is masked only as a whole word: a password ``e`` would mask a letter in every word."""

_PARSE_FAULTS = (
    ("invalid percent-encoded token", "a % in it is not followed by two hexadecimal digits; write % as %25"),
    ("forbidden value %00", "it holds %00"),
    ("invalid URI query parameter", "libpq does not know one of the parameters after the ?; a ? is written as %3F"),
    ("key/value separator", "a parameter after the ? is not of the form name=value; = in a value is written as %3D"),
    ("IPv6", "an IPv6 host is written as [address]; [ and ] elsewhere as %5B and %5D"),
    ("unexpected character", "after an IPv6 host comes : or /; [ and ] elsewhere are written as %5B and %5D"),
    ("unexpected spaces", "it holds a space, which is written as %20"),
)


def parse_fault(library_text: str) -> str:
    """The fault of a URL that libpq cannot parse. The text is one of ours, chosen by the beginning of libpq's
    message.
    """
    return next((ours for theirs, ours in _PARSE_FAULTS if theirs in library_text), "libpq cannot parse it")


def misplaced_fault(parameters: Mapping[str, Any]) -> str | None:
    """The fault of a URL that libpq parses in another way than was intended, because it takes a piece of the password
    for another part of the URL.
    """
    host, port, database = (str(parameters.get(name, "")) for name in ("host", "port", "dbname"))
    if "@" in host:
        return "the host holds an @; in user and password it is written as %40"
    if any(p and not (p.isascii() and p.isdigit() and 0 < int(p[:6]) < 65_536) for p in port.split(",")):
        return "the port is not a number from 1 to 65535; in user and password : is written as %3A and / as %2F"
    if "@" in database and "user" not in parameters:
        return "the database's name holds an @, and there is no user; in a password / is written as %2F and ? as %3F"
    return None


_NEXT_SENTENCE = re.compile(r"(?<=[\w)\"'])\s*\n\s*(?=[A-Z])")
"""The beginning of a line of libpq's message, if the previous line does not end with a full stop."""


class Redaction:
    """Masks the secrets of a connection in texts of libpq and of the server."""

    def __init__(self, url: str, parameters: Iterable[Mapping[str, Any]]) -> None:
        """``parameters``: those that libpq has parsed, and those that it has added from its own files and variables."""
        found: set[str] = {url}
        shown: set[str] = set()
        for given in parameters:
            shown |= {str(given[name]) for name in _SHOWN if given.get(name)}
            for name, value in given.items():
                text = str(value)
                if text and not _harmless(name, text):
                    found |= set(_forms(text))
                    if name == "options":
                        found |= {piece for piece in re.split(r"[\s=]+", text) if len(piece) >= _SHORT_SECRET}
        userinfo = url.partition("://")[2].partition("@")[0]
        found |= {userinfo.partition(":")[2]}
        # A password equal to the user's name is not masked: the mask would show that they are equal.
        secrets = sorted((text for text in found - shown if text), key=len, reverse=True)
        self._secrets = re.compile("|".join(map(_pattern, secrets))) if secrets else None

    def clean(self, text: str) -> str:
        """``text`` in one line, with its secrets masked."""
        masked = text if self._secrets is None else self._secrets.sub(MASK, text)
        return " ".join(_NEXT_SENTENCE.sub(". ", masked).split())


def _forms(value: str) -> Iterator[str]:
    """The forms in which a text may contain ``value``: unchanged, quoted for a URL, a connection string or Python, and
    each of its lines.
    """
    yield value
    yield quote(value, safe="")
    yield value.replace("\\", "\\\\").replace("'", "\\'")
    yield repr(value)[1:-1]
    yield from (line for line in value.splitlines() if len(line) >= _SHORT_SECRET)


def _pattern(secret: str) -> str:
    return re.escape(secret) if len(secret) >= _SHORT_SECRET else rf"(?<!\w){re.escape(secret)}(?!\w)"


@dataclass(frozen=True, slots=True)
class Host:
    """One entry of the list of hosts. An empty string stands for libpq's own default."""

    name: str
    address: str
    port: str

    @property
    def needs_name_service(self) -> bool:
        """Whether ``name`` has to be resolved: it is neither an address nor the directory of a Unix socket."""
        return bool(self.name) and not self.address and not self.name.startswith(("/", "@")) and not _numeric(self.name)

    def __str__(self) -> str:
        name = self.name or self.address or "the default host"
        if ":" in name and not name.startswith("/"):
            name = f"[{name}]"
        return f"{name}:{self.port}" if self.port else name


def _numeric(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def hosts_of(parameters: Mapping[str, Any]) -> list[Host]:
    """The hosts of a connection, in their order.

    Raises:
        ValueError: if the lists of hosts, addresses and ports have different lengths.
    """
    names, addresses, ports = (str(parameters.get(key) or "").split(",") for key in ("host", "hostaddr", "port"))
    count = max(len(names), len(addresses))
    if (len(names) > 1 or names[0]) and (len(addresses) > 1 or addresses[0]) and len(names) != len(addresses):
        raise ValueError("it has more or fewer addresses (hostaddr) than hosts")
    if len(ports) not in (1, count):
        raise ValueError("it has more or fewer ports than hosts")
    names, addresses, ports = (each if len(each) == count else each * count for each in (names, addresses, ports))
    return [Host(*parts) for parts in zip(names, addresses, ports, strict=True)]


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """The parts of a connection URL that may be shown everywhere: they name the database, and contain no secret."""

    hosts: tuple[str, ...]
    """Each as ``host:port``, in the order in which they are tried."""
    name: str
    role: str

    def __str__(self) -> str:
        return f"{','.join(self.hosts)}/{self.name}"

    def url(self) -> str:
        """The address as a URL, with a mask in place of the password."""
        hosts = ",".join(quote(host, safe=":[]") for host in self.hosts)
        return f"postgresql://{quote(self.role, safe='')}:{MASK}@{hosts}/{quote(self.name, safe='')}"


def address_of(parameters: Mapping[str, Any]) -> DatabaseAddress:
    """The address of a connection with these parameters, libpq's defaults included.

    Raises:
        ValueError: if the lists of hosts, addresses and ports have different lengths.
    """
    role = str(parameters.get("user") or "")
    hosts = tuple(str(replace(host, port=host.port or _LIBPQ_PORT)) for host in hosts_of(parameters))
    return DatabaseAddress(hosts, str(parameters.get("dbname") or role), role)


def shares(items: list[Item], deadline: float, clock: Callable[[], float]) -> Iterator[tuple[Item, float]]:
    """Each item with its share of the time until ``deadline``, which is the remaining time divided by the number of
    remaining items.

    ``clock`` is the clock of ``deadline``. It is read when an item is taken, so that later items get the time that
    earlier ones did not use.
    """
    for index, item in enumerate(items):
        yield item, max(0.0, deadline - clock()) / (len(items) - index)


class NameResolver:
    """Resolves names in threads for which the end of the process does not wait.

    A resolver that does not answer holds its thread for half a minute or more, and nothing can end that thread. The
    default executor would run out of threads, and the end of the process would wait for it. So each name has at most
    one thread: a second request for the name waits for the same answer. These threads do not keep the process alive.
    """

    def __init__(self, look_up: Callable[..., list[Any]] = socket.getaddrinfo) -> None:
        self._look_up = look_up
        self._under_way: dict[str, asyncio.Future[list[str]]] = {}

    async def addresses(self, name: str, seconds: float) -> list[str]:
        """The addresses of ``name``, in the order in which the system prefers them.

        Raises:
            TimeoutError: after ``seconds``.
            OSError: if there is none.
        """
        asked = self._under_way.get(name) or self._ask(name)
        done, _ = await asyncio.wait((asked,), timeout=seconds)
        if not done:
            raise TimeoutError(f"no answer from the name service for {name} within {seconds:.3g} s")
        return asked.result()

    def _ask(self, name: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()
        asked: asyncio.Future[list[str]] = loop.create_future()
        self._under_way[name] = asked

        def end(addresses: list[str], error: OSError | None) -> None:
            del self._under_way[name]
            if error is None:
                asked.set_result(addresses)
            else:
                asked.set_exception(error)
                asked.exception()  # retrieved here, because the waiting call may have given up

        def look_up() -> None:
            addresses: list[str] = []
            failure: OSError | None = None
            try:
                found = self._look_up(name, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
                addresses = list(dict.fromkeys(entry[4][0] for entry in found))
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not a valid name"
                failure = OSError(f"the name {name} cannot be resolved: {reason}")
            try:
                loop.call_soon_threadsafe(end, addresses, failure)
            except RuntimeError:
                return  # the loop has ended

        try:
            threading.Thread(target=look_up, name=f"resolve-{name}", daemon=True).start()
        except RuntimeError:
            end([], OSError("no thread can be started to resolve the host's name"))
        return asked
