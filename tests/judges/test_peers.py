"""The peers, whose figures are compared with ours, keep the contract, because the figure of a server with wrong answers
is meaningless.

The content of the catalogue comes from our own snapshot; the client is grpcio, and it compares octets.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from perf import peers
from perf.peers import command as program
from perf.peers import stacks
from perf.peers.stacks import STACKS
from perf.targets.target import KEY, ROOT, Target, TargetFailed, self_signed
from tests.judges.tools import command, may_build, missing
from tests.support.builds import BuildFailed
from tests.support.leftovers import nothing_left
from tests.support.polling import until
from tests.support.snapshots import opened, row

from definition_server.catalog.snapshot import Snapshot

pytestmark = may_build

GO, JS = STACKS["grpc-go"].source, STACKS["grpc-js"].source
GET, SYNC = "/avap.DefinitionEngine/GetCommand", "/avap.DefinitionEngine/SyncCatalog"
SECONDS = 30
NAMES = ("if", "größe", "無 名", "a'b", "long" * 20, *(f"command{number:04d}" for number in range(300)))
LARGE = "x = 'ä'\n" * 20_000
UNKNOWN = ("nichts / 無", "", "IF", "if ", "100%")
STRANGERS = ((), (("x-avap-auth", ""),), (("x-avap-auth", KEY[:-1]),), (("x-avap-auth", KEY + "x"),))

HARNESS = """
import os, sys, time
from types import SimpleNamespace
from perf import peers
from tests.support.snapshots import opened
# Killed, it cannot remove a folder of its own.
peers.tempfile.tempdir = os.environ["FOLDER"]
with peers.start(sys.argv[1], SimpleNamespace(snapshot=opened("if")), workers=2) as target:
    print(*target.pids, flush=True)
    time.sleep(60)
"""
"""Stands for a program that measures."""

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Served:
    """A catalogue in memory."""

    snapshot: Snapshot


@pytest.fixture(scope="module")
def catalogue() -> Served:
    """A catalogue with names that are not ASCII, an answer that fills many frames, and enough commands to make
    SyncCatalog long."""
    return Served(opened(row("large", LARGE), *(row(name, f"# {name}\n" * 40) for name in NAMES)))


@pytest.fixture(scope="module", params=STACKS)
def name(request: pytest.FixtureRequest) -> str:
    """Each stack in turn, after it was built."""
    stack = STACKS[request.param]
    if stack.missing_tools:
        missing(stack.missing_tools)
    try:
        stack.build()
    except BuildFailed as error:
        pytest.fail(str(error), pytrace=False)
    return stack.name


@pytest.fixture(scope="module")
def peer(name: str, catalogue: Served) -> Iterator[Target]:
    """A server of that stack; it serves the catalogue."""
    with peers.start(name, catalogue) as target:
        yield target


class Client:
    """A client on grpcio without protobuf: it sends and receives octets."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._get, self._sync = channel.unary_unary(GET), channel.unary_unary(SYNC)
        self._other = channel.unary_unary("/avap.DefinitionEngine/Other")

    def get(self, name: str, metadata: Metadata = (("x-avap-auth", KEY),)) -> bytes | tuple[grpc.StatusCode, str]:
        """The answer, or the status."""
        octets = name.encode()
        return _outcome(self._get, b"\x0a%c%b" % (len(octets), octets) if octets else b"", metadata)

    def sync(self, metadata: Metadata = (("x-avap-auth", KEY),)) -> bytes | tuple[grpc.StatusCode, str]:
        """The answer, or the status."""
        return _outcome(self._sync, b"", metadata)

    def other(self) -> bytes | tuple[grpc.StatusCode, str]:
        """The status of a method that does not exist."""
        return _outcome(self._other, b"", (("x-avap-auth", KEY),))


def _outcome(
    method: grpc.UnaryUnaryMultiCallable, request: bytes, metadata: Metadata
) -> bytes | tuple[grpc.StatusCode, str]:
    try:
        answer: bytes = method(request, metadata=metadata, timeout=SECONDS)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return answer


def client_of(target: Target, credentials: grpc.ChannelCredentials | None = None) -> Iterator[Client]:
    """A client on one connection of its own."""
    address = f"127.0.0.1:{target.port}"
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    made = (
        grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address, options)
    )
    with made as channel:
        yield Client(channel)


@pytest.fixture(scope="module")
def client(peer: Target) -> Iterator[Client]:
    """A client of `peer`."""
    yield from client_of(peer)


def test_every_command_gets_the_answer_of_the_snapshot(client: Client, catalogue: Served) -> None:
    for name in (*NAMES, "large"):
        assert client.get(name) == catalogue.snapshot.answer(name.encode())


def test_sync_catalog_gives_the_body_of_the_snapshot(client: Client, catalogue: Served) -> None:
    assert client.sync() == bytes(catalogue.snapshot.body)


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_an_unknown_name_is_not_found(client: Client, unknown: str) -> None:
    assert client.get(unknown) == (grpc.StatusCode.NOT_FOUND, f"Command '{unknown}' not found")


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_call_without_the_right_key_is_unauthenticated(client: Client, stranger: Metadata) -> None:
    refusal = (grpc.StatusCode.UNAUTHENTICATED, "Invalid Credentials")
    assert [client.get("if", stranger), client.get("nichts", stranger), client.sync(stranger)] == [refusal] * 3


def test_an_unknown_method_is_unimplemented(client: Client) -> None:
    answered = client.other()
    assert isinstance(answered, tuple)
    assert answered[0] is grpc.StatusCode.UNIMPLEMENTED


def test_concurrent_calls_each_get_their_own_answer(client: Client, catalogue: Served) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.get, NAMES * 3))
    assert answers == [catalogue.snapshot.answer(name.encode()) for name in NAMES * 3]


def test_calls_over_tls_are_answered(name: str, catalogue: Served, tmp_path: Path) -> None:
    command("openssl", "Debian openssl")
    files = self_signed(tmp_path)
    trusted = grpc.ssl_channel_credentials(Path(files["tls_cert_file"]).read_bytes())
    with peers.start(name, catalogue, tls=files) as target:
        for client in client_of(target, trusted):
            assert client.get("if") == catalogue.snapshot.answer(b"if")


def test_several_workers_serve_on_one_port(name: str, catalogue: Served) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with peers.start(name, catalogue, workers=3, cpus=cpus) as target:
        for _ in range(6):
            for client in client_of(target):
                assert client.get("if") == catalogue.snapshot.answer(b"if")
        processes = len(target.pids)
    assert processes == {"grpc-js": 4, "grpcio-sync": 4, "grpcio-aio": 4}.get(name, 1)


def test_one_worker_runs_only_on_its_cpu(name: str, catalogue: Served) -> None:
    last = max(os.sched_getaffinity(0))
    with peers.start(name, catalogue, cpus=[last]) as target:
        for pid in target.pids:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                assert os.sched_getaffinity(int(thread.name)) == {last}


def test_a_stopped_peer_leaves_no_process_and_no_port(name: str, catalogue: Served) -> None:
    with nothing_left(c_core=True):
        with peers.start(name, catalogue, workers=2) as target:
            pids, port = target.pids, target.port
        assert [pid for pid in pids if _runs(pid)] == []
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port))


def test_a_peer_ends_with_the_process_that_started_it(name: str, tmp_path: Path) -> None:
    # A harness that is killed closes nothing itself, so only the system closes its descriptors.
    command_line, environment = [sys.executable, "-c", HARNESS, name], os.environ | {"FOLDER": str(tmp_path)}
    with subprocess.Popen(command_line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout is not None
        pids = [int(pid) for pid in harness.stdout.readline().split()]
        assert pids
        assert all(_runs(pid) for pid in pids)
        harness.kill()
    try:
        until(lambda: not any(_runs(pid) for pid in pids), f"{name} lives on")
    finally:
        for pid in filter(_runs, pids):
            os.kill(pid, signal.SIGKILL)


def test_a_peer_that_dies_during_a_run_is_reported(name: str, catalogue: Served) -> None:
    pids: list[int] = []
    with pytest.raises(TargetFailed, match=f"{name} ended with -9"):
        _measure_and_kill(name, catalogue, pids)
    until(lambda: not any(_runs(pid) for pid in pids), f"workers of {name} live on")


def test_the_output_of_a_peer_that_does_not_start_is_reported(name: str, catalogue: Served, tmp_path: Path) -> None:
    nowhere = {"tls_cert_file": str(tmp_path / "cert.pem"), "tls_key_file": str(tmp_path / "key.pem")}
    with (
        nothing_left(c_core=True),
        pytest.raises(TargetFailed, match=rf"{name} does not start: (.|\n)*(cert\.pem|No such file)"),
        peers.start(name, catalogue, tls=nowhere),
    ):
        pass


@pytest.mark.parametrize(("name", "package"), [("nghttpd", "nghttp2-server"), ("nginx", "nginx")])
def test_a_yardstick_serves_one_answer_of_the_catalogue_and_leaves_nothing(
    name: str, package: str, catalogue: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(name, f"Debian {package}")
    nghttp = command("nghttp", "Debian nghttp2-client")
    monkeypatch.setattr(peers.tempfile, "tempdir", str(tmp_path))
    with nothing_left(), peers.start(name, catalogue) as target:
        got = subprocess.run([nghttp, f"http://127.0.0.1:{target.port}/answer"], capture_output=True, check=True)
        pids = target.pids
    assert got.stdout[5:] == next(catalogue.snapshot.messages())
    assert not any(_runs(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []
    assert name in peers.versions(name)


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No peer is built, and no tool for building is available."""
    monkeypatch.setattr(stacks, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("nothing_built")
def test_a_peer_whose_tools_are_missing_is_skipped_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["build"]) == 0
    told = capsys.readouterr().out
    assert "compiled     skipped: missing on this machine: " in told
    assert "grpc-js      skipped: missing on this machine: npm (Debian npm), node (Debian nodejs)\n" in told
    assert "grpcio-aio   ready\n" in told


@pytest.mark.usefixtures("nothing_built")
def test_the_list_names_the_missing_tools(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["list"]) == 0
    told = capsys.readouterr().out
    assert "tonic        missing on this machine: cargo (Rust 1.88 or newer)" in told
    assert "compiled     missing on this machine: " in told
    assert "nghttpd      missing on this machine: nghttpd (Debian nghttp2-server)" in told
    assert "nginx        missing on this machine: nginx (Debian nginx)" in told


def test_the_error_of_a_peer_that_is_not_built_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, catalogue: Served
) -> None:
    command("go", "Go 1.26")
    monkeypatch.setattr(stacks, "CACHE", tmp_path)
    told = "grpc-go cannot be started: not built: run `nox -s peers`"
    with pytest.raises(peers.PeerMissing, match=told), peers.start("grpc-go", catalogue):
        pass


def test_a_failed_build_reports_the_reason_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("go", "Go 1.26")
    source = tmp_path / "grpc_go"
    source.mkdir()
    (source / "main.go").write_text("package main\n\nfunc main() { nonsense }\n")
    (source / "go.mod").write_text("module peer\n")
    monkeypatch.setattr(stacks, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(STACKS["grpc-go"], "source", source)
    assert program.main(["build", "grpc-go", "grpcio-sync"]) == 1
    told = capsys.readouterr()
    assert "undefined: nonsense" in told.err
    assert "grpcio-sync  ready" in told.out
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["grpc_go.lock"]


def test_an_unknown_peer_is_refused_with_the_list_of_peers(catalogue: Served) -> None:
    told = "there is no peer 'grpc-c'; there are grpc-js, grpc-go, tonic"
    with pytest.raises(peers.PeerMissing, match=told), peers.start("grpc-c", catalogue):
        pass
    with pytest.raises(SystemExit, match="2"):
        program.main(["build", "grpc-c"])


def test_reported_versions_are_the_pinned_ones() -> None:
    assert peers.versions("tonic")["tonic"].startswith("0.14.")
    assert re.search(rf"grpc v{re.escape(peers.versions('grpc-go')['grpc-go'])}\n", (GO / "go.mod").read_text())
    assert f'"@grpc/grpc-js": "{peers.versions("grpc-js")["grpc-js"]}"' in (JS / "package.json").read_text()


def _measure_and_kill(name: str, catalogue: Served, pids: list[int]) -> None:
    with peers.start(name, catalogue) as target:
        pids += target.pids
        os.kill(target.pid, signal.SIGKILL)
        # /proc is not used: it shows a zombie as soon as the first thread has ended, while the parent is notified after
        # the last thread.
        exited = os.WEXITED | os.WNOHANG | os.WNOWAIT
        until(lambda: os.waitid(os.P_PID, target.pid, exited), "the process still runs")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
