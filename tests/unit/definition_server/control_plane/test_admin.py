"""The admin HTTP server over real connections, with the requests of probes, Prometheus and operators."""

from __future__ import annotations

import errno
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.fakes import service_status
from tests.support.leftovers import nothing_left, open_descriptors
from tests.support.polling import until

from definition_server.control_plane import admin_port, admin_share
from definition_server.control_plane.admin import AdminServer
from definition_server.control_plane.listener import PortInUse
from definition_server.observability.reasons import Reason
from definition_server.observability.status import (
    EventStatus,
    FreshnessStatus,
    HeldCommandStatus,
    PublicationStatus,
    ServiceStatus,
)


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


# One server for all tests.


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
    def ask(path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
        try:
            connection.request(method, path, headers=headers)
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


# -- answers ---------------------------------------------------------------------------------------------------------


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
    service.trouble = "the master's event loop has not run for 31 s"
    answer, text = ask("/livez")
    assert (answer.status, text) == (503, "the master's event loop has not run for 31 s\n")


def test_livez_is_200_even_if_the_service_is_not_ready(ask: Ask, service: Service) -> None:
    service.status = service_status(ready=False)
    assert ask("/livez")[0].status == 200


def test_readyz_is_200_if_the_status_is_ready(ask: Ask) -> None:
    answer, text = ask("/readyz")
    assert (answer.status, text) == (200, "ready\n")


FAILED = replace(service_status().sync, last_error=Reason.DATABASE_UNREACHABLE)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (service_status(ready=False), "no worker serves a catalogue yet"),
        (service_status(ready=False, stopping=True), "shutting down"),
        (
            service_status(ready=False, sync=FAILED),
            "no worker serves a catalogue yet; last sync: database_unreachable",
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
    assert json.loads(text).keys() == asdict(service.status).keys()
    assert json.loads(text)["workers"][0]["pid"] == 4711
    assert json.loads(text)["requests"]["by_status"] == {"200": 5, "404": 1}


def test_statusz_shows_instants_as_iso_8601_and_durations_as_numbers(ask: Ask, service: Service) -> None:
    event = EventStatus(1_700_000_002.25, "table_read_again", Reason.TABLE_LOCKED, 180.0)
    service.status = service_status(events=(event,), keys_last_used={"old": 0, "new": 1_700_000_003.0})
    page = json.loads(ask("/statusz")[1])
    assert page["started_at"] == "2023-11-14T22:13:20.000+00:00"
    assert page["catalog"]["created_at"] == page["sync"]["last_success"] == "2023-11-14T22:13:21.000+00:00"
    assert (page["events"][0]["at"], page["events"][0]["after_seconds"]) == ("2023-11-14T22:13:22.250+00:00", 180.0)
    assert page["keys_last_used"] == {"old": None, "new": "2023-11-14T22:13:23.000+00:00"}
    assert page["sync"]["age_seconds"] == 1.0


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize(
    ("path", "accept", "html"),
    [
        ("/", "*/*", True),
        ("/", BROWSER, True),
        ("/statusz", BROWSER, True),
        ("/statusz", "text/html", True),
        ("/statusz", "*/*", False),
        ("/statusz", "", False),
        ("/statusz", "application/json, text/html;q=0.5", False),
        ("/statusz", "text/html;q=0", False),
        ("/statusz", "text/*", False),
        ("/statusz?format=json", BROWSER, False),
    ],
    ids=[
        "root",
        "root-browser",
        "browser",
        "html",
        "any",
        "none",
        "json-first",
        "html-refused",
        "text",
        "asked-by-query",
    ],
)
def test_a_browser_gets_the_page_and_a_program_gets_json(ask: Ask, path: str, accept: str, html: bool) -> None:
    answer, text = ask(path, Accept=accept)
    assert answer.status == 200
    assert answer.getheader("Vary") == "Accept"
    assert str(answer.getheader("Content-Type")).partition(";")[0] == ("text/html" if html else "application/json")
    assert text.startswith("<!DOCTYPE html>" if html else "{")


def test_the_page_may_run_its_own_script_and_nothing_else(ask: Ask) -> None:
    answer, _ = ask("/")
    assert str(answer.getheader("Content-Security-Policy")).startswith("default-src 'none'; style-src 'sha256-")
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert answer.getheader("Cache-Control") == "no-store"


def test_statusz_shows_the_times_of_publications_and_held_commands_as_iso_8601(ask: Ask, service: Service) -> None:
    service.status = service_status(
        publications=(PublicationStatus(1_700_000_002.0, "ab" * 32, 2, 1, 0, 1, ("+ new",)),),
        held_commands=(HeldCommandStatus("if", "code_invalid", 1_700_000_003.0),),
    )
    page = json.loads(ask("/statusz")[1])
    assert page["publications"][0]["at"] == "2023-11-14T22:13:22.000+00:00"
    assert page["held_commands"][0]["since"] == "2023-11-14T22:13:23.000+00:00"


def test_freshz_may_be_503_while_readyz_is_200(ask: Ask, service: Service) -> None:
    assert (ask("/freshz")[0].status, ask("/freshz")[1]) == (200, "fresh\n")
    service.status = service_status(freshness=FreshnessStatus(False, "catalogue_held"))
    assert (ask("/freshz")[0].status, ask("/freshz")[1]) == (503, "stale: catalogue_held\n")
    assert ask("/readyz")[0].status == 200


def test_statusz_without_a_catalogue_is_json_too(ask: Ask, service: Service) -> None:
    service.status = service_status(catalog=None, workers=())
    assert json.loads(ask("/statusz")[1])["catalog"] is None


def test_an_unknown_path_is_404_and_lists_the_known_ones(ask: Ask) -> None:
    answer, text = ask("/health")
    assert answer.status == 404
    assert text == "Nothing here. Try /, /metrics, /livez, /readyz, /freshz, /statusz.\n"


@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", "/readyz", "/freshz", "/statusz", "/nothing"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
def test_only_get_and_head_are_allowed(ask: Ask, method: str, path: str) -> None:
    answer, text = ask(path, method)
    assert (answer.status, text) == (405, "Only GET and HEAD are answered.\n")


@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", "/readyz", "/statusz", "/nothing"])
def test_head_has_the_status_and_the_length_of_get(ask: Ask, service: Service, path: str) -> None:
    get, text = ask(path)
    head, _ = ask(path, "HEAD")
    assert head.status == get.status
    assert head.getheader("Content-Type") == get.getheader("Content-Type")
    if path != "/metrics":  # the uptime of the server grows between the requests
        assert int(str(head.getheader("Content-Length"))) == len(text.encode())


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/nothing"])
def test_head_is_answered_without_a_body(server: AdminServer, path: str) -> None:
    answer = raw(server.port, f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
    assert answer.endswith(b"\r\n\r\n")


def test_a_refused_method_gets_an_allow_header(ask: Ask) -> None:
    assert ask("/livez", "POST")[0].getheader("Allow") == "GET, HEAD, OPTIONS"


# -- behaviour -------------------------------------------------------------------------------------------------------


def test_a_slow_client_does_not_delay_others(server: AdminServer, ask: Ask) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(b"GET /livez")
        assert ask("/livez")[0].status == 200


def test_requests_are_not_logged(ask: Ask, capfd: pytest.CaptureFixture[str]) -> None:
    ask("/livez")
    assert capfd.readouterr() == ("", "")


def test_the_admin_port_answers_over_ipv6(service: Service) -> None:
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
    # The connection above is in TIME_WAIT now; a restart need not wait for its end.
    AdminServer("127.0.0.1", first.port, read=service.read, alive=service.alive).close()


def test_closing_before_it_started_is_allowed(service: Service) -> None:
    server = AdminServer("127.0.0.1", 0, read=service.read, alive=service.alive)
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


# -- clients ---------------------------------------------------------------------------------------------------------


def connected(server: AdminServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def all_of(client: socket.socket) -> bytes:
    with client.makefile("rb") as file:
        return file.read()


def test_a_request_that_is_not_complete_in_time_is_408(server: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert admin_port.REQUEST_SECONDS == 5
    monkeypatch.setattr(admin_port, "REQUEST_SECONDS", 0.05)
    with connected(server) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\n")
        assert all_of(slow).startswith(b"HTTP/1.1 408 ")


def test_a_silent_client_is_disconnected(server: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_port, "REQUEST_SECONDS", 0.05)
    with connected(server) as silent:
        assert all_of(silent) == b""


def test_a_client_that_does_not_read_is_disconnected(
    service: Service, server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert admin_port.ANSWER_SECONDS == 10
    monkeypatch.setattr(admin_port, "ANSWER_SECONDS", 0.2)
    sync = replace(service.status.sync, unserved={f"reason{number}": number for number in range(60_000)})
    service.status = service_status(sync=sync)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(b"GET /statusz HTTP/1.1\r\nHost: a\r\n\r\n")
        port = slow.getsockname()[1]
        assert slow.recv(1) == b"H"  # the server has accepted the connection, and has begun to answer
        until(lambda: port not in peers_of(server), "the server has closed the connection")


def peers_of(server: AdminServer) -> set[int]:
    """Ports of the clients whose connections this process has open on the server's port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {target for target in open_descriptors().values() if target.startswith("socket:")}
    return {
        int(row[2].split(":")[1], 16)
        for row in rows
        if int(row[1].split(":")[1], 16) == server.port and f"socket:[{row[9]}]" in inodes and row[2][-4:] != "0000"
    }


def test_a_client_that_has_ended_its_side_gets_its_answer(server: AdminServer) -> None:
    with connected(server) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        assert all_of(client).endswith(b"\r\n\r\nalive\n")


def test_an_answer_arrives_even_if_the_content_of_the_request_is_not_read(server: AdminServer) -> None:
    with connected(server) as client:
        client.sendall(b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n" + b"x" * 900_000)
        assert b" 405 " in all_of(client)


def test_a_connection_beyond_the_limit_replaces_the_oldest_of_the_address_that_holds_most(
    server: AdminServer, capfd: pytest.CaptureFixture[str]
) -> None:
    crowd = [connected(server) for _ in range(admin_port.MOST_CONNECTIONS)]
    try:
        with socket.create_connection(("127.0.0.1", server.port), 10, ("127.0.0.2", 0)) as neighbour:
            assert all_of(crowd[0]).startswith(b"HTTP/1.1 503 ")
            crowd.extend(connected(server) for _ in range(3))
            assert [all_of(each)[:12] for each in crowd[1:4]] == [b"HTTP/1.1 503"] * 3
            # The connection from the other address is older than all of these, and is still open.
            neighbour.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b" 200 " in all_of(neighbour)
    finally:
        for each in crowd:
            each.close()
    reported = capfd.readouterr()
    assert "The admin port is full; its oldest connection was closed" in reported.out + reported.err


def get(server: AdminServer, source: str) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), 10, (source, 0)) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
        return all_of(client)


def test_an_address_above_its_share_waits_while_others_are_served(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_share, "BURST_SECONDS", 0.01)
    monkeypatch.setattr(admin_share, "SHARE", 0.000001)
    monkeypatch.setattr(admin_port, "REQUEST_SECONDS", 0.3)
    answer, served = b"", -1
    while not answer or answer.startswith(b"HTTP/1.1 200 "):
        answer = get(server, "127.0.0.5")
        served += 1
    assert served > 0
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert get(server, "127.0.0.6").startswith(b"HTTP/1.1 200 ")


def test_a_request_that_waits_for_the_share_of_its_address_is_answered_later(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_share, "BURST_SECONDS", 0.0)
    for _ in range(10):
        assert get(server, "127.0.0.7").startswith(b"HTTP/1.1 200 ")


def test_a_bug_in_a_page_is_a_500_without_its_text_and_the_server_continues(
    service: Service, server: AdminServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str | None:
        raise ValueError("hunter2")

    alive = service.alive
    monkeypatch.setattr(service, "alive", fail)
    server._pages._alive = service.alive
    try:
        answer, text = ask("/livez")
    finally:
        server._pages._alive = alive
    assert (answer.status, text) == (500, "A bug of this server; see its log.\n")
    assert ask("/livez")[0].status == 200


def test_openmetrics_is_recognised_in_any_spelling_and_with_weights(server: AdminServer) -> None:
    for accept in ('application/openmetrics-text;version="1.0.0"', "application/openmetrics-text;version=1.0.0"):
        octets = raw(server.port, f"GET /metrics HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode())
        assert b"\r\nContent-Type: application/openmetrics-text; version=1.0.0;" in octets
    octets = raw(server.port, b"GET /metrics HTTP/1.0\r\nAccept-Encoding: gzip;q=0\r\n\r\n")
    assert b"Content-Encoding" not in octets


@pytest.mark.parametrize("host", ["::", "[::]", "0.0.0.0"])
def test_the_address_for_every_interface_includes_ipv4_with_any_kernel_default(service: Service, host: str) -> None:
    server = AdminServer(host, 0, read=service.read, alive=service.alive)
    server.start()
    try:
        assert b" 200 " in raw(server.port, b"GET /livez HTTP/1.0\r\n\r\n")
    finally:
        server.close()


def test_a_machine_without_ipv6_serves_ipv4_if_every_address_is_configured(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = socket.create_server

    def without_ipv6(address: tuple[str, int], **options: Any) -> socket.socket:
        if options.get("family") == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return create(address, **options)

    monkeypatch.setattr(socket, "create_server", without_ipv6)
    server = AdminServer("::", 0, read=service.read, alive=service.alive)
    server.start()
    try:
        assert b" 200 " in raw(server.port, b"GET /livez HTTP/1.0\r\n\r\n")
    finally:
        server.close()


@pytest.mark.parametrize(
    ("host", "address", "network"),
    [
        ("192.0.2.1", "192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1::7", "2001:db8:0:1::7", "2001:db8:0:1::"),
        ("fe80::1%eth0", "fe80::1%eth0", "fe80::"),
        ("::1", "::1", "::"),
    ],
)
def test_one_client_is_one_ipv4_address_or_one_ipv6_network(host: str, address: str, network: str) -> None:
    assert admin_port._address_and_network(host) == (address, network)
