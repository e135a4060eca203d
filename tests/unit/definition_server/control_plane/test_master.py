"""The start, the signals and the end of a master without workers and without a database."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import SecretStr
from tests.support.logs import LogLines, logged
from tests.support.loop import end, turns

from definition_server.catalog.gate import Gate
from definition_server.catalog.guard import Thresholds
from definition_server.control_plane import master
from definition_server.control_plane.reload import Reloadable
from definition_server.control_plane.source import ReadLimits
from definition_server.control_plane.supervisor import Supervisor
from definition_server.control_plane.worker_config import worker_config
from definition_server.observability.status import DatabaseStatus
from definition_server.settings import Settings

SETTINGS = Settings.model_validate(
    {
        "DATABASE_URL": "postgresql://u:x@127.0.0.1:1/db",
        "METRICS_HOST": "127.0.0.1",
        "METRICS_PORT": 0,
        "DRAIN_WAIT_SECONDS": 0,
        "WORKERS": 2,
    }
)


@pytest.fixture
async def server() -> AsyncIterator[Any]:
    """A master that has not been started."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        made = master._Master(SETTINGS, holder, None, hangup_stops=False)
        yield made
        await made._leave([asyncio.create_task(asyncio.sleep(0))])


@pytest.mark.parametrize(("bug", "code"), [(True, 1), (False, 0)], ids=["a task fails", "a signal"])
def test_a_master_exits_with_1_after_a_bug_and_with_0_after_a_signal(
    bug: bool, code: int, monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    async def fail() -> None:
        raise RuntimeError("a bug")

    def work(self: Any) -> Iterator[Any]:
        yield fail() if bug else asyncio.Event().wait()

    monkeypatch.setattr(master._Master, "_forever", work)
    monkeypatch.setattr(Supervisor, "start", lambda self: None)
    latest: list[tuple[float, int]] = []
    monkeypatch.setattr(master, "_exit_at_the_latest", lambda *given: latest.append(given))

    async def run() -> Any:
        with socket.create_server(("127.0.0.1", 0)) as holder:
            server = master._Master(SETTINGS, holder, None, hangup_stops=False)
            if not bug:
                asyncio.get_running_loop().call_soon(server._on_stop, signal.SIGTERM)
            return await server.run()

    assert asyncio.run(run()) == code
    assert latest == [(SETTINGS.drain_timeout_seconds + 5.0, code)]
    assert len(logged(logs, "The master failed; leaving")) == int(bug)
    assert logged(logs, "Stopped")


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1:4711"), ("::1", "[::1]:4711")], ids=["IPv4", "IPv6"]
)
@pytest.mark.parametrize("known", [True, False], ids=["", "nothing known of the database"])
async def test_the_first_log_line_names_the_address_and_the_database(
    server: Any, logs: LogLines, host: str, shown: str, known: bool
) -> None:
    class Address:
        role = "reader"

        def __str__(self) -> str:
            return "db.example:5432/avap"

    server._settings = SETTINGS.model_copy(update={"host": host})
    server._port = 4711
    source = server._source
    server._source = SimpleNamespace(address=Address() if known else None)
    server._log_start()
    server._source = source
    (line,) = logged(logs, "Starting")
    assert (line["address"], line["workers"], line["transport"]) == (shown, 2, SETTINGS.transport)
    assert (line["database"], line["role"]) == (("db.example:5432/avap", "reader") if known else ("", ""))
    assert line["signed"] is False


@pytest.mark.parametrize(("serving", "any_serves"), [(0, False), (1, True), (2, True)])
async def test_freshness_depends_on_whether_any_worker_serves(server: Any, serving: int, any_serves: bool) -> None:
    seen: list[dict[str, bool]] = []
    server._proof = SimpleNamespace(tick=lambda **facts: seen.append(facts))
    server._supervisor = SimpleNamespace(
        serving=serving, report_freshness=lambda fresh: None, drain=server._supervisor.drain
    )
    proving = asyncio.create_task(server._prove())
    await asyncio.sleep(0)
    await end(proving)
    assert seen == [{"published": False, "serving": any_serves}]


@pytest.mark.parametrize(("serving", "waits"), [(2, 0.0), (1, 2.0)])
async def test_operators_are_served_once_every_worker_serves_or_two_seconds_have_passed(
    server: Any, monkeypatch: pytest.MonkeyPatch, serving: int, waits: float
) -> None:
    now = [100.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)
    server._supervisor = SimpleNamespace(serving=serving, drain=server._supervisor.drain)
    await server._workers_serve()
    monkeypatch.undo()
    assert now[0] - 100 == pytest.approx(waits, abs=0.05)


def test_a_master_reads_a_policy_file_only_if_one_is_configured(tmp_path: Path) -> None:
    for path in (None, tmp_path / "policy.toml"):
        settings = SETTINGS.model_copy(update={"publication_policy": path})
        made = master._Master._make_policy(SimpleNamespace(_settings=settings))
        assert (made is None) is (path is None)


class Parts:
    """Starts a master with stand-ins for all of its parts, and notes the parts that it has started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Any] = []
        self.early: list[signal.Signals] = []
        self.confined, self.fault, self.port_taken, self.metrics_taken = True, None, False, False
        note = self.steps.append
        patch = monkeypatch.setattr
        patch(master.early_signals, "install", lambda: note("signals"))
        patch(master.early_signals, "received", self.early)
        patch(master, "configure_logs", lambda *given: note(("logs", *given)))
        patch(master, "confine_master", lambda jail: self.confined)
        patch(master, "log_notices", lambda _, lasting: note(("notices", lasting)))
        patch(master, "raise_descriptor_limit", lambda wanted: note(("files", wanted)) or wanted)
        patch(master, "too_few", lambda *_: self.fault)
        patch(master, "raise_process_limits", lambda _: None)
        patch(master, "read_tls_files", lambda _: None)
        patch(master, "listen", lambda *given: self._open("listen", *given))
        patch(master, "reserve_port", lambda *given: self._open("reserve", *given))
        patch(master, "_Master", self._master)

    def _open(self, *given: Any) -> Any:
        self.steps.append(given)
        if self.port_taken:
            raise master.PortInUse("the port is taken")
        return nullcontext()

    def _master(self, *_: object, hangup_stops: bool) -> Any:
        if self.metrics_taken:
            raise master.PortInUse("the metrics port is taken")

        async def run() -> int:
            return 5 if hangup_stops else 0

        return SimpleNamespace(run=run)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    return Parts(monkeypatch)


@pytest.mark.parametrize(("demonstration", "code", "files"), [(False, 0, 65536), (True, 5, 1024)])
def test_a_demonstration_does_not_warn_of_settings_that_only_a_production_server_needs(
    parts: Parts, demonstration: bool, code: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(master, "WANTED_DESCRIPTORS", 65536)
    assert master.run_master(SETTINGS, demonstration=demonstration) == code
    assert parts.steps == [
        "signals", ("logs", SETTINGS.app_env, SETTINGS.log_level), ("notices", not demonstration), ("files", files),
        ("listen", SETTINGS.host, SETTINGS.port),
    ]  # fmt: skip


def test_a_master_reserves_the_port_for_grpcio_and_listens_for_the_native_transport(parts: Parts) -> None:
    master.run_master(SETTINGS.model_copy(update={"transport": "grpcio"}))
    assert parts.steps[-1] == ("reserve", SETTINGS.host, SETTINGS.port)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"confined": False}, 78, None),
        ({"fault": "a limit is too low"}, 78, "a limit is too low"),
        ({"port_taken": True}, 69, "the port is taken"),
        ({"metrics_taken": True}, 69, "the metrics port is taken"),
    ],
    ids=["jail", "limit", "port", "metrics port"],
)
def test_an_impossible_start_is_logged_and_has_an_exit_code(
    parts: Parts, change: dict[str, Any], code: int, message: str | None, logs: LogLines
) -> None:
    vars(parts).update(change)
    assert master.run_master(SETTINGS) == code
    if message is not None:
        assert logged(logs, "Cannot start", error=message, log_level="critical")


def test_tls_files_that_cannot_be_read_prevent_a_start(
    parts: Parts, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise master.SettingsError([])

    monkeypatch.setattr(master, "read_tls_files", fail)
    assert master.run_master(SETTINGS) == 78
    assert logged(logs, "Cannot start", log_level="critical")


@pytest.mark.parametrize(
    ("number", "demonstration", "stops"),
    [
        (signal.SIGTERM, False, True), (signal.SIGINT, False, True), (signal.SIGQUIT, False, True),
        (signal.SIGHUP, False, False), (signal.SIGHUP, True, True), (signal.SIGUSR2, True, False),
    ],
)  # fmt: skip
def test_a_signal_that_arrives_before_the_start_stops_it(
    parts: Parts, number: signal.Signals, demonstration: bool, stops: bool, logs: LogLines
) -> None:
    parts.early.append(number)
    master.run_master(SETTINGS, demonstration=demonstration)
    assert len(parts.steps) == (2 if stops else 5)
    assert [line["event"] for line in logs] == (["Stopping", "Stopped"] if stops else [])
    if stops:
        assert logs[0]["signal"] == number.name


@pytest.mark.parametrize(
    ("transport", "readable", "missing"), [("native", False, False), ("grpcio", True, False), ("grpcio", False, True)]
)
def test_a_master_with_grpcio_does_not_start_without_random_numbers_of_the_kernel(
    transport: str, readable: bool, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(master.os, "access", lambda *each: readable and each == ("/dev/urandom", os.R_OK))
    assert (master._missing_device(transport) is not None) is missing


class Supervised:
    """A supervisor that notes its calls."""

    def __init__(self) -> None:
        self.serving = 0
        self.steps: list[Any] = []

    async def roll(self) -> None:
        self.steps.append("roll")

    async def drain(self, **_: Any) -> None:
        self.steps.append("drain")

    def cut_short(self) -> None:
        self.steps.append("cut short")

    def use_keys(self, keys: Any) -> None:
        self.steps.append(("keys", keys))

    def use_certificate(self, tls: Any) -> None:
        self.steps.append(("certificate", tls))


@pytest.fixture
def supervised(server: Any) -> Supervised:
    server._supervisor = Supervised()
    made: Supervised = server._supervisor
    return made


async def test_each_signal_rolls_reloads_stops_or_shortens_a_drain(
    server: Any, supervised: Supervised, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    reloads: list[Any] = []

    async def read_again(apply: Any) -> None:
        reloads.append(apply)

    monkeypatch.setattr(server._reloader, "read_again", read_again)
    monkeypatch.setattr(server._sync_loop, "sync_soon", lambda: reloads.append("sync"))
    server._on_signal(signal.SIGUSR2)
    server._on_signal(signal.SIGHUP)
    assert len(server._background) == 2
    await turns()
    assert supervised.steps == ["roll"]
    assert logged(logs, "Syncing at once", log_level="info")
    assert reloads == [server._apply, "sync"]
    assert not server._background, "tasks that have ended are forgotten"
    assert not server._stop.is_set()
    server._on_signal(signal.SIGTERM)
    assert server._stop.is_set()
    assert logged(logs, "Stopping", signal="SIGTERM")
    assert supervised.steps == ["roll"]
    server._on_signal(signal.SIGTERM)
    assert supervised.steps == ["roll", "cut short"]
    assert logged(logs, "Second signal: calls in flight are cut", signal="SIGTERM", log_level="warning")


async def test_a_hangup_stops_a_demonstration(server: Any, supervised: Supervised) -> None:
    server._hangup_stops = True
    server._on_signal(signal.SIGHUP)
    assert server._stop.is_set()


async def test_reloaded_settings_reach_the_parts_that_use_them(
    server: Any, supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []

    async def use_url(url: str) -> None:
        used.append(url)

    monkeypatch.setattr(server._source, "use_url", use_url)
    monkeypatch.setattr(server._synchronizer, "use_signer", used.append)
    monkeypatch.setattr(master, "_signer", lambda _: "the signer")
    await server._apply(Reloadable.DATABASE_URL, SETTINGS)
    await server._apply(Reloadable.SIGNING_KEY, SETTINGS)
    assert used == [SETTINGS.database_url.get_secret_value(), "the signer"]
    await server._apply(Reloadable.API_KEYS, SETTINGS)
    assert supervised.steps == [("keys", server._key_usage.message)]
    await server._apply(Reloadable.CERTIFICATE, SETTINGS)
    assert len(supervised.steps) == 1, "there is no TLS"
    monkeypatch.setattr(master, "_expiries", lambda tls: {"server": 5.0})
    server._reloader = SimpleNamespace(tls="the files")
    await server._apply(Reloadable.CERTIFICATE, SETTINGS)
    assert supervised.steps[1:] == [("certificate", "the files")]
    assert server._certificates_expire == {"server": 5.0}


async def test_the_table_is_read_again_at_once_if_bad_rows_are_served(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(server._synchronizer, "read_again", lambda: steps.append("read again"))
    monkeypatch.setattr(server._sync_loop, "sync_soon", lambda: steps.append("sync soon"))
    server._read_again()
    assert steps == ["read again", "sync soon"]


async def test_a_line_is_logged_once_when_every_worker_serves(
    server: Any, supervised: Supervised, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def serve_next(seconds: float) -> None:
        slept.append(seconds)
        supervised.serving += 1
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", serve_next)
    announcing = asyncio.create_task(server._announce())
    for _ in range(10):
        await sleep(0)
    monkeypatch.undo()
    assert slept == [0.01, 0.01]
    (line,) = logged(logs, "Serving", workers=2, log_level="info")
    assert 0 <= line["seconds"] < 60
    assert not announcing.done()
    await end(announcing)


async def test_telemetry_begins_once_the_workers_serve_and_gets_the_sampled_calls(
    server: Any, supervised: Supervised
) -> None:
    steps: list[Any] = []

    async def stop() -> None:
        steps.append("stop")

    telemetry = SimpleNamespace(
        start=lambda: steps.append(supervised.serving), calls_sampled=lambda *each: steps.append(each), stop=stop
    )
    server._on_calls_sampled(1, "calls")
    server._telemetry = telemetry
    server._on_calls_sampled(1, "calls")
    supervised.serving = 2
    exporting = asyncio.create_task(server._export(telemetry))
    await turns()
    assert steps == [(1, "calls"), 2]
    assert not exporting.done()
    await end(exporting)
    await server._leave([asyncio.create_task(asyncio.sleep(0))])
    assert steps[2:] == ["stop"]
    server._telemetry = None


def test_only_the_first_process_of_a_container_reaps_orphans_and_only_parts_in_use_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def names(pid: int, **parts: Any) -> list[str]:
        monkeypatch.setattr(os, "getpid", lambda: pid)
        given: dict[str, Any] = {"_operators": SimpleNamespace(offered=False), "_telemetry": None, "_policy": None}
        run = {"run": lambda: "run", "watch": lambda: "watch"}
        made = SimpleNamespace(
            _sync_loop=SimpleNamespace(run=lambda: "sync"), _supervisor=SimpleNamespace(**run),
            _loop_watch=SimpleNamespace(run=lambda: "loop watch"), _announce=lambda: "announce",
            _prove=lambda: "prove", _serve_operators=lambda: "operators", _export=lambda each: f"export {each}",
            **given | parts,
        )  # fmt: skip
        return list(master._Master._forever(cast(Any, made)))

    monkeypatch.setattr(master, "reap_orphans", lambda: "reap")
    always = ["sync", "watch", "loop watch", "announce", "prove"]
    assert names(2) == always
    assert names(1) == [*always, "reap"]
    policy = SimpleNamespace(run=lambda: "policy")
    assert names(2, _operators=SimpleNamespace(offered=True), _telemetry="t", _policy=policy) == [
        *always, "operators", "export t", "policy",
    ]  # fmt: skip


async def test_the_policy_takes_effect_after_the_first_publication(server: Any) -> None:
    steps: list[Any] = []

    async def note(*each: Any) -> None:
        steps.append(each)

    catalogue = SimpleNamespace(served=None, follow=lambda: note("follow"), release=lambda age: note("release", age()))
    server._synchronizer, before = SimpleNamespace(catalogue=catalogue), server._synchronizer
    await server._follow_policy()
    assert not steps
    catalogue.served = "a catalogue"
    await server._follow_policy()
    assert steps[0] == ("follow",)
    assert steps[1][0] == "release"
    assert 0 <= steps[1][1] < 5
    server._synchronizer = before


def test_a_process_that_does_not_end_in_time_is_ended_with_its_code(
    logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Timer:
        daemon, started = False, False

        def __init__(self, seconds: float, end: Any) -> None:
            self.seconds, self.end = seconds, end
            made.append(self)

        def start(self) -> None:
            self.started = self.daemon

    steps: list[Any] = []
    monkeypatch.setattr(master.threading, "Timer", Timer)
    monkeypatch.setattr(master, "flush_logs", lambda: steps.append("flush"))
    monkeypatch.setattr(master.os, "_exit", steps.append)
    master._exit_at_the_latest(7.5, 1)
    (timer,) = made
    assert (timer.seconds, timer.started) == (7.5, True)
    timer.end()
    assert steps == ["flush", 1]
    assert logged(logs, "A thread did not end in time; leaving without it", log_level="warning")


def test_the_present_key_signs_even_if_a_previous_key_is_set() -> None:
    assert master._signer(SETTINGS) is None
    keys = [SecretStr(letter * 32) for letter in "ab"]
    alone = SETTINGS.model_copy(update={"avap_internal_key": keys[0]})
    both = SETTINGS.model_copy(update={"avap_internal_key": keys[0], "avap_internal_key_previous": keys[1]})
    before = SETTINGS.model_copy(update={"avap_internal_key": keys[1]})
    signers = [master._signer(each) for each in (alone, both, before)]
    assert all(signers)
    present, rotated, previous = signers
    assert present and rotated and previous  # noqa: PT018 - for the type checker
    assert present.key_id == rotated.key_id != previous.key_id


def test_the_status_names_the_database_and_the_engine() -> None:
    source = master._source(SETTINGS)
    assert master._database(source) == DatabaseStatus(("127.0.0.1:1",), "db", "u", None)
    assert master._engine(SETTINGS.model_copy(update={"transport": "grpcio"})) == "grpcio"
    assert master._engine(SETTINGS.model_copy(update={"transport": "native"})) in ("pure", "compiled")
    unusable = master._source(SETTINGS.model_copy(update={"database_url": SecretStr("not a url")}))
    assert master._database(unusable) is None
    assert (source._connect_timeout, source._statement_timeout) == (
        SETTINGS.connect_timeout_seconds, SETTINGS.statement_timeout_seconds,
    )  # fmt: skip
    assert source._limits == ReadLimits(SETTINGS.max_definition_bytes, SETTINGS.max_catalog_bytes)


def test_the_earliest_end_of_each_certificate_file_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert master._expiries(None) == {}
    ends = {Path("server"): 5.0, Path("authorities"): None}
    monkeypatch.setattr(master, "earliest_expiry", ends.__getitem__)
    files = cast(Any, SimpleNamespace(certificate="server", client_authorities="authorities"))
    assert master._expiries(files) == {"server": 5.0}
    ends[Path("authorities")] = 7.0
    assert master._expiries(files) == {"server": 5.0, "client_authorities": 7.0}
    files.client_authorities = None
    assert master._expiries(files) == {"server": 5.0}


async def test_a_stopping_master_logs_the_duration_of_its_drain_and_its_end(logs: LogLines) -> None:
    settings = SETTINGS.model_copy(update={"drain_wait_seconds": 0.25, "drain_timeout_seconds": 7.0})
    with socket.create_server(("127.0.0.1", 0)) as holder:
        made: Any = master._Master(settings, holder, None, hangup_stops=False)
        drained: list[dict[str, float]] = []

        async def drain(**given: float) -> None:
            drained.append(given)

        made._supervisor = SimpleNamespace(drain=drain)
        await made._leave([asyncio.create_task(asyncio.sleep(0))])
        assert holder.fileno() == -1, "from now on the port is open only for as long as a worker has it open"
    (line,) = logged(logs, "Draining", log_level="info")
    assert (line["wait_seconds"], line["timeout_seconds"]) == (0.25, 7.0)
    assert drained == [{"wait": 0.25, "timeout": 7.0}]
    assert logs[-1]["event"] == "Stopped"


@pytest.mark.parametrize("transport", ["native", "grpcio"])
@pytest.mark.parametrize("stores", [True, False], ids=["with a directory", "without one"])
async def test_each_setting_reaches_the_part_that_uses_it(stores: bool, transport: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={
        "transport": transport, "workers": 3, "snapshot_dir": tmp_path if stores else None, "history_snapshots": 7,
        "control_socket": None, "guard_max_removed_percent": 11.0, "guard_max_growth_percent": 12.0,
        "guard_max_held_percent": 13.0, "guard_max_changed_percent": 14.0, "allow_empty_catalog": True,
        "full_read_interval_seconds": 15.0, "sync_interval_seconds": 16.0, "connect_timeout_seconds": 17.0,
        "heartbeat_timeout_seconds": 18.0, "start_timeout_seconds": 19.0, "gate_code": "function",
        "gate_interface": "off", "jail": "require",
    })  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as holder:
        made: Any = master._Master(settings, holder, None, hangup_stops=True)
        port = holder.getsockname()[1]
        catalogue, supervisor = made._synchronizer.catalogue, made._supervisor
        assert catalogue._guard._limits == Thresholds(11.0, 12.0, 13.0, 14.0)
        assert catalogue._guard._allow_empty is True
        assert catalogue.disk.keeps_history is stores
        assert (catalogue.disk._last_known_good is not None, catalogue.disk._wishes is not None) == (stores, stores)
        assert catalogue._wishes.now().pin is None
        assert made._synchronizer._reader._full_read_interval == 15.0
        assert (made._sync_loop._interval, made._sync_loop._patience) == (16.0, 17.0)
        assert (made._proof._interval, made._proof._stores) == (16.0, stores)
        assert made._synchronizer.observer is made._proof
        assert (supervisor._heartbeat_timeout, supervisor._start_timeout, len(supervisor.slots)) == (18.0, 19.0, 3)
        assert supervisor._config == worker_config(settings, port)
        assert supervisor._listener is (holder if transport == "native" else None)
        gate = made._gate
        assert gate._gate.checks == Gate("function", "off").checks
        assert (gate._checker._patient, gate._patient._patient) == (False, True)
        assert (gate._checker._jail, gate._patient._jail) == ("require", "require")
        status = made._status.read()
        assert status.engine == ("grpcio" if transport == "grpcio" else master.ENGINE)
        assert status.database == DatabaseStatus(("127.0.0.1:1",), "db", "u", None)
        assert status.control_socket == ("unavailable" if stores else "off")
        assert (status.keys_last_used, status.certificates_expire) == ({}, {})
        assert (status.ready, status.stopping, len(status.workers)) == (False, False, 3)
        await made._leave([asyncio.create_task(asyncio.sleep(0))])
        assert made._status.read().stopping
