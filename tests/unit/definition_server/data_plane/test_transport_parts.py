"""Parts of the transports, of the first calls and of health whose effects are hardly visible from outside."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from tests.support.logs import captured_logs, logged
from tests.support.snapshots import opened
from tests.unit.definition_server.data_plane.served_transport import CONFIGURE

from definition_server.data_plane import confine, preload
from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.confine import CannotConfine, Confinement
from definition_server.data_plane.endpoint import Endpoint
from definition_server.data_plane.failure import CallFailed, Status
from definition_server.data_plane.health import Health
from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.swap import SwapTimes
from definition_server.data_plane.transports import CannotListen, first_calls, grpcio, native
from definition_server.ipc.stats import unshared_slot
from definition_server.ipc.tls_files import TlsFiles
from definition_server.jail.confinement import Extent
from grpc_h2 import CertificateFault, Trust

NATIVE = replace(CONFIGURE, transport="native")
GRPCIO = replace(CONFIGURE, transport="grpcio")


def endpoint() -> Endpoint:
    return Endpoint(DefinitionEngine(), KeyRing(), unshared_slot())


# -- Native ----------------------------------------------------------------------------------------------------------


def test_settings_become_limits_of_the_engine() -> None:
    limits = native._limits(
        replace(
            NATIVE, keepalive_time_seconds=11.0, keepalive_timeout_seconds=12.0, keepalive_min_time_seconds=13.0,
            max_connection_age_seconds=14.0, max_connection_idle_seconds=15.0, drain_timeout_seconds=16.0,
        )
    )  # fmt: skip
    assert (limits.keepalive_time, limits.keepalive_timeout, limits.min_ping_interval) == (11.0, 12.0, 13.0)
    assert (limits.max_connection_age, limits.age_grace, limits.max_connection_idle) == (14.0, 16.0, 15.0)
    assert (limits.max_message, limits.max_buffered, limits.max_unread) == (4096, 524288, 1048576)
    unlimited = native._limits(replace(NATIVE, max_connection_age_seconds=0.0, max_connection_idle_seconds=0.0))
    assert (unlimited.max_connection_age, unlimited.age_grace, unlimited.max_connection_idle) == (inf, inf, inf)


@pytest.mark.parametrize(("most", "of_a_peer"), [(0, 0), (100, 10)])
def test_a_connection_has_thirty_seconds_for_its_first_call_and_zero_sets_no_limit_of_connections(
    most: int, of_a_peer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def server(**arguments: Any) -> Any:
        given.update(arguments)
        return made(**arguments)

    made = native.Server
    monkeypatch.setattr(native, "Server", server)
    native.NativeTransport(replace(NATIVE, max_connections=most, max_connections_per_peer=of_a_peer), endpoint())
    assert (given["max_connections"], given["max_connections_per_peer"]) == (most or None, of_a_peer or None)
    assert given["first_call_timeout"] == 30.0
    assert given["trust"]("/grpc.health.v1.Health/Check") is Trust.PROBE
    assert given["trust"]("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo") is Trust.STRANGER


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_answers_is_counted_by_method_and_status(count: int) -> None:
    slot = unshared_slot()
    methods = endpoint().methods
    missing, found = native._answer_id(methods[0], Status.NOT_FOUND), native._answer_id(methods[1], Status.OK)
    native._observer(slot)([missing] * count + [found] * (count - 1), 0.002)
    reading = slot.read()
    assert (reading.requests["404"], reading.requests["200"]) == (count, count - 1)
    assert reading.latency_sum_seconds == pytest.approx(
        {"GetCommand": 0.002 * count, "SyncCatalog": 0.002 * (count - 1)}
    )


async def test_another_certificate_is_loaded_if_tls_is_served_and_a_fault_is_logged() -> None:
    transport = native.NativeTransport(NATIVE, endpoint())
    files = cast(Any, SimpleNamespace(certificate="c", key="k", client_authorities="a"))
    with captured_logs() as lines:
        await transport.replace_certificate(files)
        assert not lines, "the port is in cleartext"
        loaded: list[tuple[Any, ...]] = []
        transport._tls = cast(Any, SimpleNamespace(replace=lambda *each: loaded.append(each)))
        await transport.replace_certificate(files)
        assert loaded == [("c", "k", "a")]
        assert logged(lines, "Certificate loaded", log_level="info")
        assert len(lines) == 1

        def refuse(*_: object) -> None:
            raise CertificateFault("the key does not match")

        transport._tls = cast(Any, SimpleNamespace(replace=refuse))
        await transport.replace_certificate(files)
    assert logged(lines, "The certificate was not replaced", error="the key does not match", log_level="error")
    assert len(lines) == 2


async def test_a_balancer_accepts_from_the_start_of_its_transport_to_its_stop() -> None:
    steps: list[str] = []
    balancer = cast(Any, SimpleNamespace(start=lambda: steps.append("start"), stop=lambda: steps.append("stop")))
    transport = native.NativeTransport(NATIVE, endpoint(), balancer=balancer)
    given: list[Any] = []
    transport._server = cast(Any, SimpleNamespace(
        add_listener=lambda listener, **each: given.append(each["policy"]), start=lambda: note("server"),
        stop=lambda grace: note(f"server stops within {grace}"),
    ))  # fmt: skip

    async def note(step: str) -> None:
        steps.append(step)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport._listener = listener
        assert await transport.start() == listener.getsockname()[1]
    await transport.stop(3)
    assert given == [balancer]
    assert steps == ["server", "start", "stop", "server stops within 3"]


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1:{}"), ("::1", "[::1]:{}")])
def test_a_port_that_is_taken_is_named(host: str, shown: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("the machine has no such loopback")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match="cannot listen on ") as refused:
            native._listen(host, port)
    assert f"{shown.format(port)}: Address already in use" in str(refused.value)


def test_answers_from_before_the_last_four_swaps_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: SimpleNamespace(time=lambda: now[0]))
    times, allowed = SwapTimes(), []
    for _ in range(6):
        now[0] += 1
        times.note()
        allowed.append(times.oldest_allowed)
    assert allowed == [None, None, None, None, 1.0, 2.0]


# -- grpcio ----------------------------------------------------------------------------------------------------------


def test_limits_are_options_of_the_core_if_they_are_set() -> None:
    options = dict(grpcio._options(replace(GRPCIO, max_connections=0, keepalive_min_time_seconds=10.0)))
    assert options["grpc.so_reuseport"] == 1
    assert options["grpc.max_send_message_length"] == -1
    assert options["grpc.max_receive_message_length"] == 4096
    assert options["grpc.keepalive_permit_without_calls"] == 1
    pings = ("grpc.http2.min_recv_ping_interval_without_data_ms", "grpc.http2.min_ping_interval_without_data_ms")
    assert [options[ping] for ping in pings] == [8000, 8000], "a PING may come a moment early"
    absent = ("grpc.max_allowed_incoming_connections", "grpc.max_connection_idle_ms", "grpc.max_connection_age_ms")
    assert not options.keys() & set(absent)
    options = dict(grpcio._options(replace(GRPCIO, max_connections=7)))
    assert options["grpc.max_allowed_incoming_connections"] == 7


@pytest.mark.parametrize(
    ("host", "address"),
    [("0.0.0.0", "0.0.0.0:5"), ("::", "[::]:5"), ("unix-abstract:name", "unix-abstract:name")],
)  # fmt: skip
def test_an_address_of_the_core_has_brackets_around_ipv6_and_no_port_at_a_unix_socket(host: str, address: str) -> None:
    assert grpcio._address(host, 5) == address


async def test_the_core_gets_another_certificate_at_the_next_handshake_if_tls_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport = grpcio.GrpcioTransport(GRPCIO, endpoint())
    made: list[Any] = []
    monkeypatch.setattr(grpcio, "_certificate", lambda tls: f"certificate {tls}")
    monkeypatch.setattr(
        grpc, "dynamic_ssl_server_credentials",
        lambda first, again, require_client_authentication: made.append((first, again, require_client_authentication)),
    )  # fmt: skip
    with captured_logs() as lines:
        await transport.replace_certificate(cast(TlsFiles, 1))
        assert transport._certificate is None, "the port is in cleartext"
        for authorities in (None, "a"):
            transport._credentials(cast(Any, SimpleNamespace(client_authorities=authorities)))
        assert [each[2] for each in made] == [False, True]
        first, again, _ = made[1]
        assert again() == first
        await transport.replace_certificate(cast(TlsFiles, 2))
        assert again() == "certificate 2"
        transport._certificate = None
        assert again() == first
    assert [line["event"] for line in lines] == ["Certificate loaded"]
    await transport.stop(0)


async def test_a_stopped_transport_of_the_core_starts_no_further_thread() -> None:
    transport = grpcio.GrpcioTransport(GRPCIO, endpoint())
    await transport.stop(0)
    with pytest.raises(RuntimeError, match="after shutdown"):
        transport._pool.submit(int)


# -- Confinement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "reflection", "names"),
    [
        ("native", False, ["threading", "definition_server.data_plane.transports.native"]),
        ("native", True, ["threading", "definition_server.data_plane.transports.native",
                          "definition_server.data_plane.reflection", "grpc._utilities"]),
        ("grpcio", False, ["threading", "definition_server.data_plane.transports.grpcio", "grpc._utilities"]),
    ],
    ids=["native", "native with reflection", "grpcio"],
)  # fmt: skip
def test_modules_that_a_confined_worker_may_need_are_imported_before(
    transport: str, reflection: bool, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[str] = []
    monkeypatch.setattr(preload, "import_module", imported.append)
    preload.preload(replace(CONFIGURE, transport=transport, reflection=reflection))
    assert imported == names


class Jail:
    """The refusals of the kernel, which the test sets."""

    def __init__(self, _: object, **given: Any) -> None:
        self.given = given
        self.reached = SimpleNamespace(extent=Extent.LANDLOCK)
        self.refused: list[str] = []

    def enter(self) -> list[str]:
        return self.refused

    start_is_over = enter


@pytest.fixture
def confinement(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Confinement, Any]]:
    """Makes a confinement in a jail of the test."""
    monkeypatch.setattr(confine, "Jail", Jail)
    monkeypatch.setattr(confine, "support", lambda: None)
    monkeypatch.setattr(confine, "preload", lambda _: None)

    def make(jail: str, transport: str = "native", *, tls: bool = False) -> tuple[Confinement, Any]:
        made = Confinement(replace(CONFIGURE, jail=jail, transport=transport, port=5), tls=tls)
        return made, made._jail

    return make


def test_a_jail_lets_grpcio_open_its_port_and_the_native_transport_its_certificate(
    confinement: Callable[..., tuple[Confinement, Any]],
) -> None:
    assert confinement("auto")[1].given == {"port": 0, "opens_memory": False}
    assert confinement("auto", tls=True)[1].given == {"port": 0, "opens_memory": True}
    assert confinement("auto", "grpcio", tls=True)[1].given == {"port": 5, "opens_memory": False}
    without, jail = confinement("off")
    assert jail is None
    without.enter()
    without.start_is_over()
    assert without.extent is Extent.NONE


@pytest.mark.parametrize("step", ["enter", "start_is_over"])
def test_an_incomplete_jail_is_logged_or_ends_the_worker_if_it_is_required(
    step: str, confinement: Callable[..., tuple[Confinement, Any]]
) -> None:
    wanted, jail = confinement("auto")
    jail.refused = ["no Landlock", "no seccomp"]
    with captured_logs() as lines:
        getattr(wanted, step)()
    (line,) = logged(lines, "The worker is not confined as it should be", log_level="warning")
    assert line["error"] == "no Landlock; no seccomp"
    assert line["jail"] == Extent.LANDLOCK
    required, jail = confinement("require")
    jail.refused = ["no Landlock"]
    with pytest.raises(CannotConfine, match="the kernel refuses: no Landlock"):
        getattr(required, step)()


# -- First calls -----------------------------------------------------------------------------------------------------


async def test_first_calls_that_get_no_answer_are_logged_and_their_connection_is_closed() -> None:
    client, server = socket.socketpair()
    server.close()
    with captured_logs() as lines:
        await first_calls.make_first_calls(client, "key")
    assert logged(lines, "Warm-up is incomplete; first calls may be slow", log_level="error")
    assert client.fileno() < 0


async def test_the_first_calls_of_a_worker_have_a_limit_of_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float | None] = []
    made = asyncio.timeout
    monkeypatch.setattr(asyncio, "timeout", lambda seconds: limits.append(seconds) or made(0))
    client, server = socket.socketpair()
    with captured_logs() as lines:
        await first_calls.make_first_calls(client, "key")
    server.close()
    assert limits == [10.0]
    assert logged(lines, "Warm-up is incomplete; first calls may be slow", error="TimeoutError()")


def test_a_connection_that_cannot_be_made_leaves_no_socket_open() -> None:
    listening = socket.socket()
    with pytest.raises(OSError, match=r"refused|not"):
        first_calls._connected(listening)  # the socket does not listen
    assert listening.fileno() < 0


# -- Health ----------------------------------------------------------------------------------------------------------


class Client:
    """A stream that accepts no message until the test allows it."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.taken: list[bytes] = []

    async def write(self, message: bytes) -> None:
        await self.reads.wait()
        self.taken.append(message)


async def iterations() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_watch_whose_client_does_not_read_is_cancelled_a_second_after_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    health, client = Health(), Client()
    await health.report(True)
    watching = asyncio.create_task(health.watch(b"", client))
    await iterations()
    later: list[tuple[float, Any, Any]] = []
    with monkeypatch.context() as patched:
        patched.setattr(
            asyncio, "get_running_loop", lambda: SimpleNamespace(call_later=lambda *each: later.append(each))
        )
        health.end_watches()
    ((seconds, cancel, task),) = later
    assert (seconds, task) == (1.0, watching)
    cancel(task)
    await asyncio.wait((watching,), timeout=5)
    assert watching.cancelled()
    assert not client.taken
    assert not health._writing
    cancel(task)
    assert len(asyncio.all_tasks()) == 1, "the write is cancelled too"


async def test_a_watch_that_has_sent_its_state_is_not_cancelled_at_the_end() -> None:
    health, client = Health(), Client()
    client.reads.set()
    await health.report(True)
    watching = asyncio.create_task(health.watch(b"", client))
    await iterations()
    health._cancel(watching)
    health.end_watches()
    await asyncio.wait((watching,), timeout=5)
    assert watching.exception() is None
    assert client.taken == [b"\x08\x01"]
    assert not health._waiting


async def test_a_write_that_has_begun_is_finished_although_its_watch_is_cancelled() -> None:
    health, client = Health(), Client()
    await health.report(True)
    watching = asyncio.create_task(health.watch(b"", client))
    await iterations()
    watching.cancel()
    await iterations()
    assert not watching.done()
    client.reads.set()
    await asyncio.wait((watching,), timeout=5)
    assert watching.cancelled()
    assert client.taken == [b"\x08\x01"]


# -- Failures --------------------------------------------------------------------------------------------------------


def test_a_refusal_is_remembered_unless_a_bug_has_caused_it() -> None:
    method = endpoint().methods[0]
    for status in (Status.NOT_FOUND, Status.INTERNAL):
        answer = native._refusal(method, CallFailed(status, "text"))
        assert answer.lasting is (status is not Status.INTERNAL)
        assert answer.answer_id == native._answer_id(method, status)


def test_an_answer_names_the_catalogue_by_sixteen_digits_of_its_hash() -> None:
    engine = DefinitionEngine()
    assert engine.version == ()
    engine.snapshot = opened("if")
    assert engine.version == (("avap-version", engine.snapshot.version_hash[:16]),)
    first = engine.version
    assert engine.version is first
    engine.snapshot = opened("else")
    assert engine.version == (("avap-version", engine.snapshot.version_hash[:16]),)
    engine.names_version = False
    assert engine.version == ()
