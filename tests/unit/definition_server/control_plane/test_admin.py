"""The admin HTTP server over real connections: what probes, Prometheus and operators receive."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from http.client import HTTPConnection, HTTPResponse

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.fakes import service_status
from tests.support.leftovers import nothing_left

from definition_server.control_plane import admin
from definition_server.control_plane.admin import AdminServer
from definition_server.control_plane.listener import PortInUse
from definition_server.observability.status import ServiceStatus


class Service:
    """The state that the admin server reads; a test changes it between two requests."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.status = service_status()
        self.trouble: str | None = None

    def read(self) -> ServiceStatus:
        return self.status

    def alive(self) -> str | None:
        return self.trouble


# One server for all tests: closing one takes half a second, the interval at which `socketserver` checks for its end.


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Service, AdminServer]]:
    with nothing_left():
        service = Service()
        server = AdminServer("127.0.0.1", 0, read=service.read, alive=service.alive)
        server.start()
        yield service, server
        server.close()


@pytest.fixture(autouse=True)
def _nothing_left(shared: tuple[Service, AdminServer]) -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def service(shared: tuple[Service, AdminServer]) -> Service:
    service = shared[0]
    service.reset()
    return service


@pytest.fixture
def server(shared: tuple[Service, AdminServer], service: Service) -> AdminServer:
    return shared[1]


Ask = Callable[..., tuple[HTTPResponse, str]]


@pytest.fixture
def ask(server: AdminServer) -> Ask:
    def ask(path: str, method: str = "GET") -> tuple[HTTPResponse, str]:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer, answer.read().decode()
        finally:
            connection.close()

    return ask


def raw(port: int, request: bytes) -> bytes:
    """All octets of the response."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        with connection.makefile("rb") as file:
            return file.read()


# -- what is answered ------------------------------------------------------------------------------------------------


def test_metrics_are_in_prometheus_format_with_the_names_of_the_contract(ask: Ask) -> None:
    answer, text = ask("/metrics")
    assert answer.status == 200
    assert str(answer.getheader("Content-Type")).startswith("text/plain; version=")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["avap_cache_size",] == 2
    assert samples["avap_requests_total", "200"] == 5
    assert samples["avap_requests_total", "404"] == 1
    assert samples["process_open_fds",] > 0


def test_livez_is_200_while_the_loop_runs_and_503_when_it_hangs(ask: Ask, service: Service) -> None:
    answer, text = ask("/livez")
    assert (answer.status, text) == (200, "alive\n")
    service.trouble = "the master's event loop has stood still for 31 s"
    answer, text = ask("/livez")
    assert (answer.status, text) == (503, "the master's event loop has stood still for 31 s\n")


def test_livez_is_200_although_not_ready(ask: Ask, service: Service) -> None:
    service.status = service_status(ready=False)
    assert ask("/livez")[0].status == 200


def test_readyz_is_200_if_the_status_is_ready(ask: Ask) -> None:
    answer, text = ask("/readyz")
    assert (answer.status, text) == (200, "ready\n")


FAILED = replace(service_status().sync, last_error="connection refused")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (service_status(ready=False), "no worker serves a catalogue yet"),
        (service_status(ready=False, stopping=True), "shutting down"),
        (
            service_status(ready=False, sync=FAILED),
            "no worker serves a catalogue yet; last sync: connection refused",
        ),
    ],
    ids=["not yet", "stopping", "database down"],
)
def test_readyz_is_503_with_the_reason_if_not_ready(
    ask: Ask, service: Service, status: ServiceStatus, reason: str
) -> None:
    service.status = status
    answer, text = ask("/readyz")
    assert (answer.status, text) == (503, f"not ready: {reason}\n")


def test_readyz_is_200_despite_a_failed_sync(ask: Ask, service: Service) -> None:
    service.status = service_status(sync=FAILED)
    assert ask("/readyz")[0].status == 200


def test_statusz_is_the_whole_status_as_json(ask: Ask, service: Service) -> None:
    answer, text = ask("/statusz")
    assert (answer.status, answer.getheader("Content-Type")) == (200, "application/json")
    assert json.loads(text) == json.loads(json.dumps(asdict(service.status)))
    assert json.loads(text)["workers"][0]["pid"] == 4711


def test_statusz_without_a_catalogue_is_json_too(ask: Ask, service: Service) -> None:
    service.status = service_status(catalog=None, workers=())
    assert json.loads(ask("/statusz")[1])["catalog"] is None


def test_an_unknown_path_is_404_and_lists_the_known_ones(ask: Ask) -> None:
    answer, text = ask("/health")
    assert answer.status == 404
    assert text == "Nothing here. Try /metrics, /livez, /readyz, /statusz.\n"


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz", "/statusz", "/nothing"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_get_and_head_are_allowed(ask: Ask, method: str, path: str) -> None:
    answer, text = ask(path, method)
    assert (answer.status, text) == (405, "Only GET and HEAD are answered.\n")


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz", "/statusz", "/nothing"])
def test_head_has_the_status_and_the_length_of_get(ask: Ask, service: Service, path: str) -> None:
    get, text = ask(path)
    head, _ = ask(path, "HEAD")
    assert head.status == get.status
    assert head.getheader("Content-Type") == get.getheader("Content-Type")
    if path != "/metrics":  # which grows while it is asked
        assert int(str(head.getheader("Content-Length"))) == len(text)


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/nothing"])
def test_head_is_answered_without_a_body(server: AdminServer, path: str) -> None:
    answer = raw(server.port, f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
    assert answer.endswith(b"\r\n\r\n")


def test_a_refused_method_gets_an_allow_header(ask: Ask) -> None:
    assert ask("/livez", "POST")[0].getheader("Allow") == "GET, HEAD"


# -- how it answers --------------------------------------------------------------------------------------------------


def test_a_slow_client_does_not_delay_others(server: AdminServer, ask: Ask) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(b"GET /livez")
        assert ask("/livez")[0].status == 200


def test_a_silent_client_is_disconnected(
    service: Service, server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert admin._Handler.timeout == 10
    monkeypatch.setattr(admin._Handler, "timeout", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
        assert silent.recv(1) == b""


def test_requests_are_not_logged(ask: Ask, capfd: pytest.CaptureFixture[str]) -> None:
    ask("/livez")
    assert capfd.readouterr() == ("", "")


def test_it_answers_over_ipv6(service: Service) -> None:
    try:
        server = AdminServer("::1", 0, read=service.read, alive=service.alive)
    except PortInUse:
        pytest.skip("no IPv6 here")
    server.start()
    try:
        with socket.create_connection(("::1", server.port), timeout=10) as connection:
            connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
            assert b"200 OK" in connection.recv(1000)
    finally:
        server.close()


# -- the port --------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_reported_with_its_variable(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortInUse) as caught:
            AdminServer("127.0.0.1", port, read=service.read, alive=service.alive)
    assert str(caught.value) == (
        f"127.0.0.1:{port} is in use by another process (another definition-server?). "
        "Stop it, or set METRICS_PORT to a free port."
    )


def test_two_servers_do_not_share_a_port(service: Service, server: AdminServer) -> None:
    with pytest.raises(PortInUse):
        AdminServer("127.0.0.1", server.port, read=service.read, alive=service.alive)


def test_closing_ends_the_thread_and_frees_the_port_at_once(service: Service) -> None:
    before = set(threading.enumerate())
    first = AdminServer("127.0.0.1", 0, read=service.read, alive=service.alive)
    first.start()
    assert "200 OK" in raw(first.port, b"GET /livez HTTP/1.0\r\n\r\n").decode()
    first.close()
    assert "admin-http" not in {thread.name for thread in threading.enumerate() if thread not in before}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", first.port))
    # The connection above is in TIME_WAIT now; a restart does not wait for it.
    AdminServer("127.0.0.1", first.port, read=service.read, alive=service.alive).close()


def test_closing_before_it_started_is_allowed(service: Service) -> None:
    server = AdminServer("127.0.0.1", 0, read=service.read, alive=service.alive)
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
