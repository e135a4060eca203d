"""The main task on every available PostgreSQL: a standard client gets the rows of the table, byte for byte."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator

import pytest
from tests.conftest import StartServer
from tests.support.client import Client, failure
from tests.support.providers import DatabaseServer, create_database, drop_database
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

pytestmark = pytest.mark.every_transport

ROWS = [
    ("if", "function", '[{"item": "left", "type": "var"}]', "if left:\n    pass\n"),
    ("addVar", None, None, "context.variables[name] = value\n"),
    ("empty type and interface", "", "", "pass\n"),
    ("cite \"quoted\" 'name'", "function", "[]", "print('\"')\n"),
    ("line\nbreak\ttab", "function", "[]", "x = 1\r\ny = 2\n"),
    ("años_日本語_😀", "función", '[{"item": "ñ", "type": "😀"}]', "s = 'ünïcödé 😀'\n"),
    ("no code", "function", "[]", ""),
    ("n" * 100, "t" * 50, "[]", "pass"),
]


def expected(row: tuple[str, str | None, str | None, str]) -> tuple[str, str, str, bytes]:
    name, kind, interface, code = row
    return name, kind or "function", interface or "[]", code.encode()


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    """One worker: the number of workers does not matter here."""
    return {"WORKERS": "1"}


@pytest.fixture
def url_of_every_provider(every_postgres: DatabaseServer) -> Iterator[str]:
    yield create_database(every_postgres.url, "test_serving")
    drop_database(every_postgres.url, "test_serving")


def test_a_client_gets_every_definition_byte_for_byte(url_of_every_provider: str, start_server: StartServer) -> None:
    Table(url_of_every_provider).add(ROWS)
    server = start_server(url_of_every_provider).wait_ready()
    with Client(server.port) as client:
        catalogue = client.sync()
        assert [c.name for c in catalogue.commands] == sorted((row[0] for row in ROWS), key=str.encode)
        assert catalogue.total_count == len(ROWS)
        by_name = {c.name: c for c in catalogue.commands}
        for row in ROWS:
            answer = client.get(row[0])
            assert (answer.name, answer.type, answer.interface_json, answer.code) == expected(row)
            assert answer == by_name[row[0]]
            assert len(bytes.fromhex(answer.hash)) == 32


def test_signed_code_verifies_with_the_key_and_carries_the_source(table: Table, start_server: StartServer) -> None:
    table.add(ROWS)
    server = start_server(table.url, AVAP_INTERNAL_KEY="clé de signature").wait_ready()
    with Client(server.port) as client:
        for row in ROWS:
            package = client.get(row[0]).code
            magic, version, length = struct.unpack(">4sHI", package[:10])
            mac, payload = package[10:42], package[42:]
            assert (magic, version, length) == (b"AVAP", 1, len(payload))
            assert mac == hmac.digest("clé de signature".encode(), package[:10] + payload, hashlib.sha256)
            assert payload == row[3].encode()


@pytest.mark.thorough  # starts servers
@pytest.mark.any_transport
def test_hashes_are_the_same_on_every_server_signed_or_not_and_after_a_restart(
    table: Table, start_server: StartServer
) -> None:
    table.add(ROWS)
    seen = []
    for settings in ({}, {"AVAP_INTERNAL_KEY": "k"}, {"WORKERS": "1"}):
        server = start_server(table.url, **settings).wait_ready()
        with Client(server.port) as client:
            catalogue = client.sync()
        seen.append((catalogue.version_hash, [(c.name, c.hash) for c in catalogue.commands]))
        server.end()
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ((), "missing"),
        ((("x-avap-auth", ""),), "empty"),
        ((("x-avap-auth", KEY + "x"),), "wrong"),
        ((("x-avap-auth", KEY), ("x-avap-auth", KEY)), "duplicate"),
        ((("x-avap-auth-bin", KEY.encode()),), "binary"),
    ],
)
def test_a_missing_wrong_or_repeated_key_is_refused(
    shared_server: ServerProcess, metadata: tuple[tuple[str, str | bytes], ...], why: str
) -> None:
    before = shared_server.metric("avap_requests_total", status="401")
    with Client(shared_server.port) as client:
        for method in ("GetCommand", "SyncCatalog"):
            told = failure(client.raw, method, b"", metadata)
            assert told == ("UNAUTHENTICATED", "Invalid Credentials"), why
    shared_server.wait_metric(before + 2, "avap_requests_total", status="401")


@pytest.mark.parametrize("name", ["nothing", "", "añ'\n\"o", "IF", "if "])
def test_the_error_for_an_unknown_name_contains_the_name(shared_server: ServerProcess, name: str) -> None:
    before = shared_server.metric("avap_requests_total", status="404")
    with Client(shared_server.port) as client:
        assert failure(client.get, name) == ("NOT_FOUND", f"Command '{name}' not found")
    shared_server.wait_metric(before + 1, "avap_requests_total", status="404")


@pytest.mark.parametrize("request_bytes", [b"\x0a\x05ab", b"\xff\xff\xff", b"\x0a\x02\xc3\x28", b"\x08"])
def test_a_request_that_is_not_protobuf_is_an_invalid_argument(
    shared_server: ServerProcess, request_bytes: bytes
) -> None:
    before = shared_server.metric("avap_requests_total", status="400")
    with Client(shared_server.port) as client:
        told = failure(client.raw, "GetCommand", request_bytes)
    assert told == ("INVALID_ARGUMENT", "The request is not a valid avap.CommandRequest")
    shared_server.wait_metric(before + 1, "avap_requests_total", status="400")


def test_an_oversized_request_is_refused_and_the_connection_stays_open(shared_server: ServerProcess) -> None:
    with Client(shared_server.port) as client:
        assert failure(client.get, "x" * (5 * 1024 * 1024))[0] == "RESOURCE_EXHAUSTED"
        assert client.get("if").name == "if"


def test_health_needs_no_key_and_names_both_services(shared_server: ServerProcess) -> None:
    with Client(shared_server.port, key=None) as client:
        assert client.health("") == "SERVING"
        assert client.health("avap.DefinitionEngine") == "SERVING"
        assert client.health("something.Else") == "NOT_FOUND"


def test_reflection_is_off_unless_configured_on_a_server(
    table: Table, shared_server: ServerProcess, start_server: StartServer
) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    table.add(ROWS)
    reflecting = start_server(table.url, REFLECTION="true").wait_ready()
    with Client(reflecting.port) as client:
        services = ProtoReflectionDescriptorDatabase(client.channel).get_services()
        assert "avap.DefinitionEngine" in services
    with Client(shared_server.port) as client:
        method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        call = client.channel.stream_stream(method)
        assert failure(lambda: list(call(iter([b""]), timeout=5)))[0] == "UNIMPLEMENTED"


def test_readiness_liveness_and_status_are_served_over_http(shared_server: ServerProcess) -> None:
    assert shared_server.http("/livez") == (200, "alive\n")
    assert shared_server.http("/readyz") == (200, "ready\n")
    status = shared_server.statusz()
    assert status["catalog"]["definitions"] == len(ROWS)
    assert [worker["state"] for worker in status["workers"]] == ["serving", "serving"]
    assert shared_server.metric("avap_cache_size") == len(ROWS)
    assert shared_server.http("/nothing")[0] == 404


def test_the_broadcast_is_logged_with_the_fields_that_dashboards_use(shared_server: ServerProcess) -> None:
    line = shared_server.wait_log("Definitions Broadcasted")
    assert line["level"] == "INFO"
    assert line["count"] == len(ROWS)
    assert line["generation"] == 1
    assert line["duration_ms"] > 0
    assert line["version_hash"] == shared_server.statusz()["catalog"]["version_hash"]
    assert shared_server.other_output == [], "every line is JSON"


@pytest.fixture(scope="module")
def shared_server(postgres: DatabaseServer, transport: str) -> Iterator[ServerProcess]:
    """One server for tests that only read."""
    name = f"test_serving_{transport}"
    url = create_database(postgres.url, name)
    Table(url).add(ROWS)
    with ServerProcess(url, TRANSPORT=transport) as server:
        yield server.wait_ready()
    drop_database(postgres.url, name)
