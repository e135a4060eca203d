"""``get``, ``fetch`` and ``health`` over TLS, against both transports, and their error messages."""

from __future__ import annotations

import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from click.testing import CliRunner, Result
from grpc_health.v1 import health_pb2
from tests.support.certificates import Authority, Certificate
from tests.support.native_server import LOOPS, ServerThread

from definition_server.cli import client
from definition_server.cli.tls import system_authorities
from definition_server.rpc import avap_pb2
from grpc_h2 import Server, TlsCredentials

VARIABLES = ("CA_FILE", "CLIENT_CERT_FILE", "CLIENT_KEY_FILE")
NO_SETTINGS = {"API_KEY_FILE": None, "DEFINITION_SERVER_HOST": None, "PORT": None} | {
    f"DEFINITION_SERVER_{name}": None for name in VARIABLES
}
PATIENCE = 20.0
COMMAND = avap_pb2.CommandResponse(name="plus", code=b"pass\n")


def method(answer: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(lambda request, context: answer.SerializeToString())


SERVICES = {
    "avap.DefinitionEngine": {
        "GetCommand": method(COMMAND),
        "SyncCatalog": method(avap_pb2.CatalogResponse(commands=[COMMAND], total_count=1)),
    },
    "grpc.health.v1.Health": {"Check": method(health_pb2.HealthCheckResponse(status="SERVING"))},
}
HANDLERS = tuple(grpc.method_handlers_generic_handler(name, methods) for name, methods in SERVICES.items())

Serve = Callable[..., AbstractContextManager[int]]
"""Runs a server: with a certificate over TLS, and with an authority only for clients with a certificate from it."""


@contextmanager
def native(shown: Certificate | None = None, client_ca: Path | None = None) -> Iterator[int]:
    ports = []

    def prepare(server: Server) -> None:
        server.add_generic_rpc_handlers(HANDLERS)
        if shown is None:
            ports.append(server.add_insecure_port("127.0.0.1:0"))
        else:
            ports.append(server.add_secure_port("127.0.0.1:0", TlsCredentials(shown.cert, shown.key, client_ca)))

    with (
        ThreadPoolExecutor(2) as pool,
        ServerThread(LOOPS["asyncio"], prepare, listen=False, executor=pool),
    ):
        yield ports[0]


@contextmanager
def grpcio(shown: Certificate | None = None, client_ca: Path | None = None) -> Iterator[int]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers(HANDLERS)
        if shown is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            pair = (shown.key.read_bytes(), shown.cert.read_bytes())
            ca = None if client_ca is None else client_ca.read_bytes()
            port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], ca, ca is not None))
        server.start()
        try:
            yield port
        finally:
            server.stop(0).wait(PATIENCE)


@pytest.fixture(params=[native, grpcio], ids=lambda kind: kind.__name__)
def serve(request: pytest.FixtureRequest) -> Serve:
    kind: Serve = request.param
    return kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("authority")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Authority:
    return Authority(folder, "stranger")


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    return authority.sign("server")


@pytest.fixture(scope="module")
def own(authority: Authority) -> Certificate:
    return authority.sign("client")


def run(command: click.Command, *arguments: str, **environment: str | None) -> Result:
    """Settings are named without the prefix DEFINITION_SERVER_."""
    given = {f"DEFINITION_SERVER_{name}" if name in VARIABLES else name: value for name, value in environment.items()}
    result = CliRunner().invoke(command, list(arguments), env={**NO_SETTINGS, "API_KEY": "key", **given})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def show(certificate: Certificate) -> tuple[str, ...]:
    return "--client-cert-file", str(certificate.cert), "--client-key-file", str(certificate.key)


CALLS = [
    pytest.param(client.get, ["plus"], id="get"),
    pytest.param(client.fetch, [], id="fetch"),
    pytest.param(client.health, [], id="health"),
]


@pytest.mark.parametrize(("command", "arguments"), CALLS)
def test_every_command_uses_tls_if_an_authority_is_named(
    serve: Serve, authority: Authority, certificate: Certificate, command: click.Command, arguments: list[str]
) -> None:
    with serve(certificate) as port:
        by_option = run(command, *arguments, "--port", str(port), "--ca-file", str(authority.cert))
        by_variable = run(command, *arguments, PORT=str(port), CA_FILE=str(authority.cert))
    assert (by_option.exit_code, by_variable.exit_code) == (0, 0), by_option.stderr + by_variable.stderr


def test_options_take_precedence_over_the_environment(
    authority: Authority, stranger: Authority, certificate: Certificate
) -> None:
    with native(certificate) as port:
        wrong = {"PORT": str(port), "CA_FILE": str(stranger.cert)}
        assert run(client.health, **wrong).exit_code == 69
        assert run(client.health, "--ca-file", str(authority.cert), **wrong).exit_code == 0


@pytest.mark.parametrize(("command", "arguments"), CALLS)
def test_a_client_certificate_is_presented_to_a_server_that_demands_one(
    serve: Serve,
    authority: Authority,
    certificate: Certificate,
    own: Certificate,
    command: click.Command,
    arguments: list[str],
) -> None:
    with serve(certificate, authority.cert) as port:
        trusting = {"PORT": str(port), "CA_FILE": str(authority.cert)}
        by_option = run(command, *arguments, *show(own), **trusting)
        pair = {"CLIENT_CERT_FILE": str(own.cert), "CLIENT_KEY_FILE": str(own.key)}
        by_variable = run(command, *arguments, **trusting, **pair)
    assert (by_option.exit_code, by_variable.exit_code) == (0, 0), by_option.stderr + by_variable.stderr


def test_a_server_that_demands_another_client_certificate_exits_69_with_that_reason(
    serve: Serve, authority: Authority, stranger: Authority, certificate: Certificate
) -> None:
    with serve(certificate, authority.cert) as port:
        for shown in ((), show(stranger.sign("foreign"))):
            result = run(client.get, "plus", *shown, PORT=str(port), CA_FILE=str(authority.cert))
            assert result.exit_code == 69
            assert "if it demands a client certificate, set --client-cert-file and --client-key-file" in result.stderr


def test_a_certificate_of_another_authority_exits_69_and_names_the_option(
    serve: Serve, stranger: Authority, certificate: Certificate
) -> None:
    with serve(certificate) as port:
        result = run(client.get, "plus", PORT=str(port), CA_FILE=str(stranger.cert))
    assert result.exit_code == 69
    assert "certificate is not trusted: set --ca-file (DEFINITION_SERVER_CA_FILE)" in result.stderr


def test_a_certificate_for_another_name_exits_69_and_asks_for_that_name(serve: Serve, authority: Authority) -> None:
    with serve(authority.sign("elsewhere", "DNS:elsewhere.example")) as port:
        result = run(client.get, "plus", PORT=str(port), CA_FILE=str(authority.cert))
    assert result.exit_code == 69
    assert "failed. Call it by a name that its certificate holds: set --host" in result.stderr


def test_a_server_in_cleartext_exits_69_and_the_remedy_is_to_omit_the_option(
    serve: Serve, authority: Authority
) -> None:
    with serve() as port:
        result = run(client.get, "plus", PORT=str(port), CA_FILE=str(authority.cert))
    assert result.exit_code == 69
    assert "It serves no TLS: leave --ca-file" in result.stderr


def test_a_call_in_cleartext_to_a_server_with_tls_exits_69_and_names_the_option(
    serve: Serve, certificate: Certificate
) -> None:
    with serve(certificate) as port:
        for command, arguments in ((client.get, ["plus"]), (client.health, [])):
            result = run(command, *arguments, PORT=str(port))
            assert result.exit_code == 69
            assert "if it serves TLS, set --ca-file (DEFINITION_SERVER_CA_FILE)" in result.stderr


# Settings that are refused


def test_an_unusable_tls_file_exits_78_and_is_named_with_the_reason(
    authority: Authority, own: Certificate, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no certificate")
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("missing", "No such file"), ("text", "cannot be loaded"), ("pipe", "not a regular file")):
        path = str(tmp_path / name)
        result = run(client.health, "--ca-file", path)
        assert result.exit_code == 78
        assert f"DEFINITION_SERVER_CA_FILE = '{path}': it" in result.stderr
        assert why in result.stderr
        for variable, pair in (("CERT", (path, str(own.key))), ("KEY", (str(own.cert), path))):
            shown = ("--client-cert-file", pair[0], "--client-key-file", pair[1])
            result = run(client.health, "--ca-file", str(authority.cert), *shown)
            assert result.exit_code == 78
            assert f"DEFINITION_SERVER_CLIENT_{variable}_FILE = " in result.stderr


def test_a_key_of_another_certificate_exits_78(authority: Authority, own: Certificate) -> None:
    foreign = Certificate(own.cert, authority.sign("another").key)
    result = run(client.health, *show(foreign), CA_FILE=str(authority.cert))
    assert result.exit_code == 78
    assert "the key does not belong to the certificate" in result.stderr


def test_one_variable_of_a_pair_exits_78_and_names_both(authority: Authority, own: Certificate) -> None:
    for half in ("--client-cert-file", str(own.cert)), ("--client-key-file", str(own.key)):
        result = run(client.health, *half, CA_FILE=str(authority.cert))
        assert result.exit_code == 78
        assert (
            "DEFINITION_SERVER_CLIENT_CERT_FILE and DEFINITION_SERVER_CLIENT_KEY_FILE belong together" in result.stderr
        )


def test_a_client_certificate_without_an_authority_exits_78_and_never_goes_over_cleartext(own: Certificate) -> None:
    with native() as port:
        result = run(client.health, *show(own), PORT=str(port))
    assert result.exit_code == 78
    assert "it needs DEFINITION_SERVER_CA_FILE" in result.stderr


# The system's authorities


def system_is(monkeypatch: pytest.MonkeyPatch, file: Path, folder: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    monkeypatch.setenv("SSL_CERT_DIR", str(folder))


def test_system_trusts_the_authorities_of_this_machine(
    serve: Serve, authority: Authority, certificate: Certificate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system_is(monkeypatch, authority.cert, tmp_path)
    with serve(certificate) as port:
        assert run(client.get, "plus", "--ca-file", "system", PORT=str(port)).exit_code == 0


def test_system_does_not_trust_another_authority(
    stranger: Authority, certificate: Certificate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system_is(monkeypatch, stranger.cert, tmp_path)
    with native(certificate) as port:
        result = run(client.get, "plus", PORT=str(port), CA_FILE="system")
    assert result.exit_code == 69
    assert "not trusted" in result.stderr


def test_the_systems_authorities_are_read_from_its_folder_too(
    authority: Authority, stranger: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(authority.cert, tmp_path / "house.pem")
    (tmp_path / "README").write_text("no certificate")
    system_is(monkeypatch, stranger.cert, tmp_path)
    found = system_authorities().decode()
    for known in (authority, stranger):
        assert ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(known.cert.read_text())) in found


def test_a_system_without_authorities_exits_78(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system_is(monkeypatch, tmp_path / "missing", tmp_path)
    result = run(client.health, "--ca-file", "system")
    assert result.exit_code == 78
    assert "DEFINITION_SERVER_CA_FILE = 'system': none are installed" in result.stderr
