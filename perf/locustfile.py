"""Simulated language servers for locust: ``API_KEY=… locust -f perf/locustfile.py --host 127.0.0.1:50051``.

Each user is a language server with its own connection. It reads the catalogue when it starts, then requests commands, a
few of them often (Zipf), with a pause between two calls; sometimes an unknown name, or with a wrong key. An answer with
a wrong status or name is a failure, and so is one whose hash differs from the catalogue's, unless the catalogue has
changed meanwhile; the user reads it again to find out.

Locust uses many times the CPU time of the server for a call, so it shows the experience of users, not the capacity of
the server, which ``nox -s perf`` measures.
"""

from __future__ import annotations

import random
import sys
import time
from argparse import ArgumentParser
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import grpc
from grpc.experimental.gevent import init_gevent
from locust import User, events, task

from definition_server.rpc import avap_pb2

init_gevent()  # before the first channel, so that gRPC waits through gevent

DEFAULT_HOST = "127.0.0.1:50051"
SERVICE = "/avap.DefinitionEngine/"
UNKNOWN = "no such command {}"
WRONG_KEY = "a wrong key"
_ANSWER_OCTETS = 1 << 31
"""Maximum size of a message: a catalogue exceeds gRPC's default of 4 MiB."""
_SYNC_SECONDS = 30.0
_USAGE = 2


@events.init_command_line_parser.add_listener
def options(parser: ArgumentParser) -> None:
    """Add our options to locust's own."""
    add: Callable[..., Any] = parser.add_argument  # locust's parser knows env_var and is_secret
    add("--api-key", env_var="API_KEY", default="", is_secret=True, help="value of x-avap-auth")
    add("--ca-file", env_var="DEFINITION_SERVER_CA_FILE", default="", help="call over TLS and trust this PEM file")
    add("--pause", type=float, default=1.0, help="mean seconds between two calls of a user (exponential; 0: none)")
    add("--zipf", type=float, default=1.1, help="exponent: how much more often the first commands are requested")
    add("--unknown", type=float, default=0.01, help="share of calls for unknown names")
    add("--bad-key", type=float, default=0.001, help="share of calls with a wrong key")
    add("--deadline", type=float, default=5.0, help="seconds that a call may take")


@events.init.add_listener
def check_at_start(environment: Any, **_: Any) -> None:
    """End at once if the options are not valid. With the web page, the user may still set them there."""
    wrong = _wrong(environment.parsed_options)
    if wrong and environment.parsed_options.headless:
        print(f"perf/locustfile.py: {wrong}", file=sys.stderr)
        raise SystemExit(_USAGE)


@events.test_start.add_listener
def check_before_test(environment: Any, **_: Any) -> None:
    """With the web page: end if the options are not valid."""
    wrong = _wrong(environment.parsed_options)
    if wrong and environment.runner is not None:
        print(f"perf/locustfile.py: {wrong}", file=sys.stderr)
        environment.process_exit_code = _USAGE
        environment.runner.quit()


def _wrong(given: Any) -> str:
    """The fault of these options; empty if they are valid."""
    if not given.api_key:
        return "a key is needed: set API_KEY, or give --api-key"
    if not (given.unknown >= 0 and given.bad_key >= 0 and given.unknown + given.bad_key <= 1):
        return "--unknown and --bad-key are shares: each must be at least 0, their sum at most 1"
    if not (given.pause >= 0 and given.deadline > 0 and given.zipf > 0):
        return "--pause must be at least 0, --deadline and --zipf above 0"
    if given.ca_file and not Path(given.ca_file).is_file():
        return f"--ca-file: there is no file {given.ca_file}"
    return ""


class WrongAnswer(Exception):
    """The server's answer is wrong; the text names the difference."""


class Catalogue:
    """A language server's knowledge of the definitions: names in the order of their rank, and hashes."""

    latest: Catalogue | None = None
    """Shared by all users of a process, so that a thousand users do not hold a thousand copies."""

    def __init__(self, answer: avap_pb2.CatalogResponse, exponent: float) -> None:
        self.version = answer.version_hash
        self.hashes = {command.name: command.hash for command in answer.commands}
        self.names = sorted(self.hashes)
        random.Random(7).shuffle(self.names)  # so that ranks are not in alphabetical order
        self._sums = list(accumulate(1 / rank**exponent for rank in range(1, len(self.names) + 1)))

    @classmethod
    def of(cls, answer: avap_pb2.CatalogResponse, exponent: float) -> Catalogue:
        """The catalogue of ``answer``; the existing object if the version is the same."""
        if cls.latest is None or cls.latest.version != answer.version_hash:
            cls.latest = cls(answer, exponent)
        return cls.latest

    def choose(self) -> str:
        """A random name; the first ranks are the most frequent."""
        return self.names[bisect_left(self._sums, random.random() * self._sums[-1])]


class LanguageServer(User):
    """One language server."""

    catalogue: Catalogue

    def wait_time(self) -> float:
        """Seconds until the next call."""
        pause = self.environment.parsed_options.pause
        return random.expovariate(1 / pause) if pause else 0.0

    def on_start(self) -> None:
        """Connect, and read the catalogue; a user that cannot do so stops."""
        given = self.environment.parsed_options
        settings = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", _ANSWER_OCTETS - 1),
        ]
        host = self.host or DEFAULT_HOST
        target = host.partition("://")[2] or host
        if given.ca_file:
            credentials = grpc.ssl_channel_credentials(Path(given.ca_file).read_bytes())
            self.channel = grpc.secure_channel(target, credentials, options=settings)
        else:
            self.channel = grpc.insecure_channel(target, options=settings)
        self._get = self._method("GetCommand", avap_pb2.CommandRequest, avap_pb2.CommandResponse)
        self._sync = self._method("SyncCatalog", avap_pb2.Empty, avap_pb2.CatalogResponse)
        while not self.synchronize():
            time.sleep(1.0)  # like a language server; locust can end a waiting user

    def on_stop(self) -> None:
        """Close the connection."""
        self.channel.close()

    def _method(self, name: str, request: Any, response: Any) -> Callable[..., Any]:
        return self.channel.unary_unary(
            SERVICE + name, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )

    def synchronize(self) -> bool:
        """Read the catalogue. Returns whether that succeeded."""
        given = self.environment.parsed_options

        def checked(answer: avap_pb2.CatalogResponse) -> None:
            if answer.total_count != len(answer.commands):
                raise WrongAnswer(f"total_count {answer.total_count}, but {len(answer.commands)} commands")
            if not answer.commands:
                raise WrongAnswer("an empty catalogue: there is no command to request")

        answer = self.call("SyncCatalog", self._sync, avap_pb2.Empty(), given.api_key, checked, seconds=_SYNC_SECONDS)
        if answer is None:
            return False
        self.catalogue = Catalogue.of(answer, given.zipf)
        return True

    @task
    def ask(self) -> None:
        """Make one call: mostly with a known name, sometimes with an unknown name or a wrong key."""
        given, draw = self.environment.parsed_options, random.random()
        if draw < given.bad_key:
            name, expected = self.catalogue.choose(), (grpc.StatusCode.UNAUTHENTICATED, "Invalid Credentials")
            request = avap_pb2.CommandRequest(name=name)
            self.call("GetCommand, wrong key", self._get, request, WRONG_KEY, expected=expected)
        elif draw < given.bad_key + given.unknown:
            name = UNKNOWN.format(random.randrange(10_000))
            missing = (grpc.StatusCode.NOT_FOUND, f"Command '{name}' not found")
            request = avap_pb2.CommandRequest(name=name)
            self.call("GetCommand, unknown name", self._get, request, given.api_key, expected=missing)
        else:
            self.known(self.catalogue.choose())

    def known(self, name: str) -> None:
        """Request ``name``. A hash that differs from the catalogue's is accepted only if the catalogue has changed."""
        before, changed = self.catalogue, False

        def checked(answer: avap_pb2.CommandResponse) -> None:
            nonlocal changed
            if answer.name != name:
                raise WrongAnswer(f"requested {name!r}, got {answer.name!r}")
            changed = answer.hash != before.hashes[name]

        self.call(
            "GetCommand",
            self._get,
            avap_pb2.CommandRequest(name=name),
            self.environment.parsed_options.api_key,
            checked,
        )
        if changed and self.synchronize() and self.catalogue.version == before.version:
            failure = WrongAnswer(f"the hash of {name!r} differs from the catalogue's, whose version has not changed")
            self._report("GetCommand", 0.0, 0, failure)

    def call(
        self,
        name: str,
        method: Callable[..., Any],
        request: Any,
        key: str,
        checked: Callable[[Any], None] = lambda _: None,
        *,
        expected: tuple[grpc.StatusCode, str] | None = None,
        seconds: float | None = None,
    ) -> Any:
        """Make a call and report it to locust: a success if it ends as ``expected`` (default: OK).

        Returns:
            The answer; None if there was no answer or a wrong one.
        """
        limit = self.environment.parsed_options.deadline if seconds is None else seconds
        answer, failure = None, None
        began = time.perf_counter()
        try:
            answer = method(request, metadata=(("x-avap-auth", key),), timeout=limit)
        except grpc.RpcError as error:
            if (error.code(), error.details()) != expected:
                failure = WrongAnswer(f"{error.code().name}: {error.details()}")
        elapsed = (time.perf_counter() - began) * 1000
        if answer is not None:
            try:
                if expected is not None:
                    raise WrongAnswer(f"expected {expected[0].name}, got a definition")
                checked(answer)
            except WrongAnswer as error:
                failure = error
        self._report(name, elapsed, 0 if answer is None else answer.ByteSize(), failure)
        return answer if failure is None else None

    def _report(self, name: str, milliseconds: float, octets: int, failure: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="gRPC", name=name, response_time=milliseconds, response_length=octets, exception=failure,
            context={},
        )  # fmt: skip
