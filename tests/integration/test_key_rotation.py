"""API keys by id: a rotation under load refuses no call, a removed key is refused on open connections, and metrics show
which keys are in use.
"""

from __future__ import annotations

import signal
from pathlib import Path

import grpc
import pytest
from tests.conftest import StartServer
from tests.support.certificates import Authority
from tests.support.client import Client, Tls
from tests.support.load import Load
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table

from definition_server.api_keys import LONGEST_KEY

NAMES = [f"command{number}" for number in range(20)]


def reload(server: ServerProcess, what: str = "API_KEY, API_KEYS") -> None:
    before = len(server.lines)
    server.signal(signal.SIGHUP)
    server.wait_log("Settings read again", after=before, what=what)


def last_used(server: ServerProcess, key_id: str) -> float:
    return server.metric("avap_key_last_used_timestamp_seconds", key_id=key_id)


def refused(client: Client) -> bool:
    try:
        client.get("command1")
    except grpc.RpcError as error:
        return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def test_a_rotation_with_overlap_refuses_no_call(table: Table, start_server: StartServer, tmp_path: Path) -> None:
    table.add_commands(20)
    keys = tmp_path / "keys"
    keys.write_text("# before\nold:key-one\n")
    server = start_server(table.url, API_KEY="", API_KEYS_FILE=str(keys)).wait_ready()
    with Load(server.port, NAMES, key="key-one") as old:
        old.wait_answered(100)
        keys.write_text("old:key-one\nnew:key-two\n")
        reload(server)
        until(lambda: last_used(server, "old") > 0, server.tail)
        assert last_used(server, "new") == 0
        # Workers do not confirm that they have the new keys; an operator gives clients the new key later.
        with Client(server.port, key="key-two") as client:
            until(lambda: not refused(client), server.tail)
        with Load(server.port, NAMES, key="key-two") as new:
            new.wait_answered(100)
            old.wait_answered(100)
            until(lambda: last_used(server, "new") > 0, server.tail)
    with Load(server.port, NAMES, key="key-two") as newest:
        newest.wait_answered(50)
        keys.write_text("new:key-two\n")
        reload(server)
        newest.wait_answered(100)
    for load in (old, new, newest):
        result = load.result
        assert not result.failed, str(result)
        assert result.answered == result.offered
    assert 'key_id="old"' not in server.http("/metrics")[1]


def test_a_removed_key_is_refused_on_a_connection_that_was_open_and_authorized(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(20)
    keys = tmp_path / "keys"
    keys.write_text("old:key-one\nnew:key-two\n")
    server = start_server(table.url, API_KEY="", API_KEYS_FILE=str(keys)).wait_ready()
    with Client(server.port, key="key-one") as old, Client(server.port, key="key-two") as new:
        for client in (old, new):
            for _ in range(3):
                assert not refused(client)
        keys.write_text("new:key-two\n")
        reload(server)
        until(lambda: refused(old), server.tail)
        assert all(refused(old) for _ in range(3))
        assert not refused(new)
        keys.write_text("new:key-two\nbroken")
        before = len(server.lines)
        server.signal(signal.SIGHUP)
        line = server.wait_log("Settings not read again; the old ones stay", after=before)
        assert "line 2" in line["error"]
        assert not refused(new)


@pytest.mark.thorough  # takes seconds
def test_the_time_of_a_key_advances_while_an_open_connection_uses_it(table: Table, start_server: StartServer) -> None:
    table.add_commands(20)
    server = start_server(table.url, API_KEY="single", API_KEYS="extra:other").wait_ready()
    assert last_used(server, "default") == last_used(server, "extra") == 0
    with Load(server.port, NAMES, key="single", rate=50, connections=1) as load:
        until(lambda: last_used(server, "default") > 0, server.tail)
        first = last_used(server, "default")
        until(lambda: last_used(server, "default") > first, server.tail, seconds=30)
        load.wait_answered(10)
    assert last_used(server, "extra") == 0


@pytest.mark.thorough  # takes seconds
def test_the_longest_key_that_is_allowed_reaches_the_server(table: Table, start_server: StartServer) -> None:
    table.add_commands(20)
    server = start_server(table.url, API_KEY="k" * LONGEST_KEY, API_KEYS="short:key").wait_ready()
    with Client(server.port, key="k" * LONGEST_KEY) as client:
        assert client.get("command1").name == "command1"
    with Client(server.port, key="k" * (LONGEST_KEY - 1)) as client:
        assert refused(client)


@pytest.mark.thorough  # takes seconds
@pytest.mark.any_transport
def test_a_certificate_that_does_not_fit_its_key_does_not_prevent_a_rotation_of_api_keys(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(20)
    authority = Authority(tmp_path)
    made, other = authority.sign("server"), authority.sign("other")
    keys = tmp_path / "keys"
    keys.write_text("old:key-one\n")
    server = start_server(
        table.url, API_KEY="", API_KEYS_FILE=str(keys), TLS_CERT_FILE=str(made.cert), TLS_KEY_FILE=str(made.key)
    ).wait_ready()
    served = server.metric("avap_certificate_expiry_timestamp_seconds", certificate="server")
    assert served > 0
    made.key.write_bytes(other.key.read_bytes())
    keys.write_text("new:key-two\n")
    before = len(server.lines)
    server.signal(signal.SIGHUP)
    line = server.wait_log("Settings not read again; the old ones stay", after=before)
    assert "TLS_KEY_FILE" in line["error"]
    assert server.metric("avap_certificate_expiry_timestamp_seconds", certificate="server") == served
    with Client(server.port, key="key-two", tls=Tls(authority.cert)) as client:
        until(lambda: not refused(client), server.tail)
