"""``status HOST…``: real admin ports on several addresses, and servers that are no admin port, in one table."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from tests.support.fakes import service_status

from definition_server.cli import fleet
from definition_server.cli.fleet import Address, parse_target
from definition_server.cli.main import cli
from definition_server.control_plane.admin import AdminServer
from definition_server.observability.reasons import Reason
from definition_server.observability.status import CatalogStatus, FreshnessStatus, ServiceStatus

SERVICE = "definition-server-headless"
OLD, NEW = "ab" * 32, "cd" * 32

Serve = Callable[..., int]


def replica(number: int, version: str = OLD, **changes: Any) -> ServiceStatus:
    catalog = CatalogStatus(3, version, 189, 606, 1_700_000_001.0, 1_700_000_060.0 + number)
    return service_status(**{"hostname": f"pod-{number}", "catalog": catalog, **changes})


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve statuses on 127.0.0.1, 127.0.0.2 … under one port, as the pods of a headless service do. Yields the
    port."""
    with ExitStack() as stack:

        def start(*statuses: ServiceStatus) -> int:
            port = 0
            for number, status in enumerate(statuses, start=1):
                server = AdminServer(f"127.0.0.{number}", port, read=lambda s=status: s, alive=lambda: None)
                stack.callback(server.close)
                server.start()
                port = server.port
            return port

        yield start


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Name → addresses, for the name service of the test."""
    known: dict[str, list[str]] = {}

    real = socket.getaddrinfo

    def look_up(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        if host == "nowhere.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [entry for each in known.get(host, [host]) for entry in real(each, port, *args, **options)]

    monkeypatch.setattr(fleet.socket, "getaddrinfo", look_up)
    return known


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["status", *arguments])


def lines_of(result: Result) -> list[list[str]]:
    """The lines of the output in a pipe, with the heading first."""
    return [line.split("\t") for line in result.stdout.splitlines()]


def document(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_replicas_that_agree_are_listed_with_version_since_when_and_freshness(
    serve: Serve, names: dict[str, list[str]]
) -> None:
    port = serve(replica(1), replica(2), replica(3))
    names[SERVICE] = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    done = run(f"{SERVICE}:{port}")
    assert done.exit_code == 0, done.output
    head, *rows = lines_of(done)
    assert head == ["replica", "version", "since", "fresh", "state", "host"]
    assert rows[1] == [f"127.0.0.2:{port}", OLD, "2023-11-14T22:14:22Z", "yes", "ready", "pod-2"]
    assert len(rows) == 3


def test_a_replica_that_serves_another_version_is_named_and_the_exit_code_is_1(serve: Serve) -> None:
    port = serve(replica(1), replica(2, NEW), replica(3))
    done = run(*(f"127.0.0.{number}:{port}" for number in (1, 2, 3)))
    assert done.exit_code == 1
    first, second, third = (f"127.0.0.{number}:{port}" for number in (1, 2, 3))
    assert f"2 versions: {OLD[:8]} by {first}, {third}; {NEW[:8]} by {second}" in done.stderr
    states = [row[4] for row in lines_of(done)[1:]]
    assert states == ["ready", "ready, differs", "ready"]


def test_the_replica_with_the_older_publication_is_named_if_two_versions_differ(serve: Serve) -> None:
    port = serve(replica(1), replica(2, NEW))
    told = document(run("--json", f"127.0.0.1:{port}", f"127.0.0.2:{port}"))
    assert [each["differs"] for each in told["replicas"]] == [True, False]
    assert told["versions"] == {OLD: 1, NEW: 1}
    assert told["good"] is False


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [
        (replica(2, ready=False), "not ready", "1 of 2 are not ready"),
        (replica(2, ready=False, stopping=True), "stopping", "1 of 2 are not ready"),
        (replica(2, freshness=FreshnessStatus(False, "check_late")), "ready", "1 of 2 are not fresh"),
        (
            replace(
                replica(2, freshness=FreshnessStatus(False, "catalogue_held")),
                sync=replace(service_status().sync, held_reason=Reason.CATALOGUE_SHRUNK, pinned="command"),
            ),
            "ready, catalogue held, pinned",
            "1 of 2 are not fresh",
        ),
        (replica(2, ready=False, catalog=None), "not ready", "1 of 2 are not ready"),
    ],
    ids=["not-ready", "stopping", "late", "held", "nothing-served"],
)
def test_a_replica_with_a_fault_is_shown_with_it_and_the_exit_code_is_1(
    serve: Serve, status: ServiceStatus, state: str, words: str
) -> None:
    port = serve(replica(1), status)
    done = run(f"127.0.0.1:{port}", f"127.0.0.2:{port}")
    assert done.exit_code == 1
    assert words in done.stderr
    assert lines_of(done)[2][4] == state


@pytest.fixture
def odd() -> Iterator[Callable[[bytes | None], int]]:
    """Listen on a port, and answer each connection with octets, or never (None)."""
    with ExitStack() as stack:

        def start(octets: bytes | None) -> int:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def answer() -> None:
                try:
                    while True:
                        client = listener.accept()[0]
                        stack.callback(client.close)
                        if octets is not None:
                            client.recv(10_000)
                            client.sendall(octets)
                            client.shutdown(socket.SHUT_WR)
                except OSError:
                    return

            thread = threading.Thread(target=answer)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return int(listener.getsockname()[1])

        yield start


def answer_of(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("octets", "words"),
    [
        (None, "no answer in time"),
        (b"", "the connection broke"),
        (b"SSH-2.0-OpenSSH\r\n", "no definition server"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP status 404"),
        (answer_of(b"{"), "no definition server"),
        (answer_of(b"[" * 100_000), "no definition server"),
        (answer_of(b"[]"), "no definition server"),
        (answer_of(b'{"catalog": 1, "sync": 2, "freshness": 3}'), "no definition server"),
        (answer_of(b"\xff\xfe"), "no definition server"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n{", "no definition server"),
    ],
    ids=["silent", "empty", "ssh", "not-found", "half", "deep", "list", "numbers", "no-text", "cut-off"],
)
def test_a_host_that_is_not_a_definition_server_is_shown_as_a_row_without_a_traceback(
    serve: Serve, odd: Callable[[bytes | None], int], octets: bytes | None, words: str
) -> None:
    good, bad = serve(replica(1)), odd(octets)
    done = run(f"127.0.0.1:{good}", f"127.0.0.1:{bad}", "--timeout", "2")
    assert done.exit_code == 1, done.output
    rows = lines_of(done)[1:]
    assert rows[0][4] == "ready"
    assert words in rows[1][4]
    assert f"1 of 2 do not answer: 127.0.0.1:{bad}" in done.stderr


def test_the_exit_code_is_69_if_no_replica_answers(names: dict[str, list[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = run(f"127.0.0.1:{port}", "nowhere.example")
    assert done.exit_code == 69
    rows = lines_of(done)[1:]
    assert rows[0][4] == "Connection refused"
    assert rows[1][0] == "nowhere.example:9464"
    assert "cannot be resolved" in rows[1][4]


def test_a_process_with_several_addresses_is_one_row(serve: Serve) -> None:
    port = serve(replica(1), replica(1))
    assert len(run(f"127.0.0.1:{port}", f"127.0.0.2:{port}", f"127.0.0.1:{port}").stdout.splitlines()) == 2


def test_a_family_of_addresses_on_which_nothing_listens_is_left_out(serve: Serve, names: dict[str, list[str]]) -> None:
    port = serve(replica(1))
    names["localhost"] = ["::1", "127.0.0.1"]
    done = run(f"localhost:{port}")
    assert done.exit_code == 0, done.output
    assert [row[0] for row in lines_of(done)[1:]] == [f"127.0.0.1:{port}"]


def test_control_characters_of_a_hostile_answer_are_escaped(serve: Serve) -> None:
    port = serve(replica(1, hostname="\x1b[31mred"))
    done = run(f"127.0.0.1:{port}")
    assert done.exit_code == 0
    assert "\\x1b[31mred" in done.stdout
    assert "\x1b" not in done.stdout + run("--json", f"127.0.0.1:{port}").stdout


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("db", Address("db", 9464)),
        ("db.example:80", Address("db.example", 80)),
        ("10.0.0.1:1", Address("10.0.0.1", 1)),
        ("::1", Address("::1", 9464)),
        ("[fe80::1]", Address("fe80::1", 9464)),
        ("[::1]:99", Address("::1", 99)),
    ],
)
def test_a_target_is_a_host_with_an_optional_port(text: str, address: Address) -> None:
    assert parse_target(text) == address


@pytest.mark.parametrize("text", ["", ":1", "a:0", "a:70000", "a:b", "http://a", "a b", "user@a", "[::1", "\x1b"])
def test_an_invalid_target_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.UsageError):
        parse_target(text)


def test_hosts_and_a_socket_exclude_each_other() -> None:
    done = run("a", "--socket", "x")
    assert done.exit_code == 2
    assert "--socket" in done.stderr
