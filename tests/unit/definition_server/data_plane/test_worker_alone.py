"""A worker process with the test as its master: the messages that it accepts and refuses, and its drain."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tests.support.client import Client, failure
from tests.support.leftovers import open_descriptors
from tests.support.polling import until
from tests.unit.definition_server.data_plane.served_transport import CONFIGURE, KEY

from definition_server.catalog.builder import BuiltSnapshot, SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.data_plane.worker import EXIT_CANNOT_START
from definition_server.ipc import messages
from definition_server.ipc.channel import Channel
from definition_server.ipc.memory import create_sealed
from definition_server.ipc.stats import StatsPage

pytestmark = [pytest.mark.slow, pytest.mark.any_transport]

PROGRAM = "import sys; from definition_server.data_plane.worker import main; sys.exit(main(sys.argv[1:]))"
UNPREPARED = """
from definition_server.data_plane.transports.native import NativeSwap
async def prepare(self): raise RuntimeError("a bug")
NativeSwap.prepare = prepare
"""
SLOWLY_PREPARED = """
import asyncio
from definition_server.data_plane.transports.native import NativeSwap
async def prepare(self, ready=NativeSwap.prepare): await asyncio.sleep(1.5); await ready(self)
NativeSwap.prepare = prepare
"""

REPORTING_UVLOOP = """
import json, uvloop
def reporting(make=uvloop.new_event_loop): print(json.dumps({"msg": "uvloop"}), flush=True); return make()
uvloop.new_event_loop = reporting
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def built(generation: int, *names: str) -> BuiltSnapshot:
    builder = SnapshotBuilder()
    builder.add(Row(number, name.encode(), None, None, b"pass") for number, name in enumerate(names))
    return builder.build(generation=generation, created_at_ns=0)


class WorkerAlone:
    """The process, and the master's end of its control socket."""

    def __init__(self, *first: messages.Message, before: str = "") -> None:
        self.channel, theirs = Channel.pair()
        self.page = StatsPage()
        for message in first:
            assert self.channel.send(message)
        self.process = subprocess.Popen(
            [sys.executable, "-c", before + PROGRAM, str(theirs.fileno()), str(self.page.descriptor)],
            pass_fds=[theirs.fileno(), self.page.descriptor],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # C-core writes lines of its own there
            text=True,
        )
        theirs.close()
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def publish(self, snapshot: BuiltSnapshot, *, announced: str | None = None) -> None:
        descriptor = create_sealed("test", snapshot.pieces)
        version = snapshot.footer.version_hash.hex()
        assert self.channel.send(messages.Publish(snapshot.footer.generation, announced or version), descriptor)
        os.close(descriptor)

    def wait_ready(self) -> int:
        """Wait for the next Ready; returns its generation."""
        message: messages.Message = messages.KeysUsed(())
        while isinstance(message, messages.KeysUsed | messages.Mapped):  # may arrive between any two others
            message = until(self.channel.receive, lambda: f"READY {self.lines}")[0]
        assert isinstance(message, messages.Ready)
        return message.generation

    def logged(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["msg"] == message]

    def mappings(self) -> int:
        """The number of snapshots that the process holds open."""
        return len([link for link in open_descriptors(self.process.pid).values() if "memfd:test" in link])

    def end(self) -> None:
        self.channel.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.page.close()


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def configure(transport: str, port: int) -> messages.Configure:
    """The configuration, for each transport."""
    return replace(CONFIGURE, transport=transport, port=port)


@pytest.fixture
def worker(configure: messages.Configure) -> Iterator[WorkerAlone]:
    """A worker that serves generation 1 with the one command ``if``."""
    made = WorkerAlone(configure, messages.Keys((sha256(KEY.encode()).hexdigest(),)))
    made.publish(built(1, "if"))
    assert made.wait_ready() == 1
    yield made
    made.end()


def test_ready_is_reported_when_the_port_is_open_and_after_every_swap(worker: WorkerAlone, port: int) -> None:
    with Client(port, KEY) as client:
        assert client.get("if", timeout=2).name == "if"
        worker.publish(built(2, "else", "if"))
        assert worker.wait_ready() == 2
        assert client.sync().total_count == 2
    # A batch is counted after it has been sent, so the client may know its answer before.
    slot = worker.page
    until(lambda: slot.read().requests["200"] >= 2, "both calls counted")
    reading = slot.read()
    assert (reading.generation, reading.entries) == (2, 2)
    assert reading.version_hash == built(2, "else", "if").footer.version_hash.hex()
    assert reading.requests["200"] == 2, "the warm-up is not counted"


def test_a_snapshot_that_fails_a_check_is_refused_and_the_old_one_stays(worker: WorkerAlone, port: int) -> None:
    good = built(2, "else")
    worker.publish(good, announced="00" * 32)
    for content, sealed in ((good.to_bytes(), False), (good.to_bytes()[:-1], True), (b"", True), (b"x" * 999, True)):
        if sealed:
            descriptor = create_sealed("test", [content])
        else:
            descriptor = os.memfd_create("test")
            os.write(descriptor, content)
        assert worker.channel.send(messages.Publish(2, good.footer.version_hash.hex()), descriptor)
        os.close(descriptor)
    until(lambda: len(worker.logged("Snapshot refused")) == 5, lambda: str(worker.lines))
    with Client(port, KEY) as client:
        assert [command.name for command in client.sync().commands] == ["if"]
        assert client.health() == "SERVING"
    worker.publish(built(3, "else"))
    assert worker.wait_ready() == 3


def test_a_failed_preparation_does_not_prevent_the_swap(port: int) -> None:
    worker = WorkerAlone(
        replace(CONFIGURE, transport="native", port=port),
        messages.Keys((sha256(KEY.encode()).hexdigest(),)),
        before=UNPREPARED,
    )
    try:
        for generation in (1, 2, 3):
            worker.publish(built(generation, f"command{generation}"))
            assert worker.wait_ready() == generation
            with Client(port, KEY) as client:
                assert client.get(f"command{generation}").name == f"command{generation}"
        until(lambda: len(worker.logged("Answers could not be prepared; the first calls may be slow")) == 2, "the log")
    finally:
        worker.end()


def test_a_snapshot_overtaken_during_a_preparation_is_left_out_and_released(port: int) -> None:
    worker = WorkerAlone(
        replace(CONFIGURE, transport="native", port=port),
        messages.Keys((sha256(KEY.encode()).hexdigest(),)),
        before=SLOWLY_PREPARED,
    )
    try:
        for generation in range(1, 5):
            worker.publish(built(generation, "if", f"command{generation}"))
            if generation == 1:
                assert worker.wait_ready() == 1
        with Client(port, KEY) as client:
            assert client.get("command1").name == "command1", "served until the next one is ready"
            ready = [worker.wait_ready()]
            while ready[-1] != 4:
                ready.append(worker.wait_ready())
            # The second was read before or after the third and fourth arrived; of snapshots that are read together only
            # the last is served.
            assert ready in ([2, 4], [4])
            assert client.get("command4").name == "command4"
            assert failure(client.get, "command1")[0] == "NOT_FOUND"
        until(lambda: worker.mappings() == 1, lambda: f"{worker.mappings()} mappings, one is wanted")
    finally:
        worker.end()


def test_replaced_keys_apply_at_once(worker: WorkerAlone, port: int) -> None:
    with Client(port, KEY) as client:
        client.get("if")
        assert worker.channel.send(messages.Keys((sha256(b"other").hexdigest(),)))
        worker.publish(built(2, "if"))
        assert worker.wait_ready() == 2
        assert failure(client.get, "if")[0] == "UNAUTHENTICATED"


def test_a_certificate_in_memory_that_could_change_is_ignored_and_closed(worker: WorkerAlone, port: int) -> None:
    made = [os.memfd_create("loose") for _ in range(3)]
    for count in (1, 2, 3):
        assert worker.channel.send(messages.Certificate(1), *made[:count])
    for descriptor in made:
        os.close(descriptor)
    until(lambda: len(worker.logged("Control message ignored")) == 3, lambda: str(worker.lines))
    with Client(port, KEY) as client:
        assert client.get("if").name == "if"
    assert not [link for link in open_descriptors(worker.process.pid).values() if "memfd:loose" in link]


def test_an_unknown_control_message_is_ignored(worker: WorkerAlone, port: int) -> None:
    worker.channel._socket.send(b"garbage")
    assert worker.channel.send(messages.Ready(7))
    until(lambda: len(worker.logged("Control message ignored")) == 2, lambda: str(worker.lines))
    with Client(port, KEY) as client:
        assert client.get("if").name == "if"


@pytest.mark.parametrize("how", ["drain", "master gone"])
def test_a_worker_exits_0_on_drain_on_sigterm_and_when_the_master_has_ended(worker: WorkerAlone, how: str) -> None:
    if how == "drain":
        assert worker.channel.send(messages.Drain(announce=True, wait_seconds=0.1, timeout_seconds=3))
    else:
        worker.channel.close()
    assert worker.process.wait(10) == 0


def test_an_announced_drain_reports_not_serving_and_still_answers(worker: WorkerAlone, port: int) -> None:
    with Client(port, KEY) as client:
        assert client.health() == "SERVING"
        assert worker.channel.send(messages.Drain(announce=True, wait_seconds=1.0, timeout_seconds=10))
        announced = time.monotonic()
        until(lambda: client.health() == "NOT_SERVING", "the announcement")
        assert client.get("if").name == "if"
        assert worker.process.wait(20) == 0
    assert time.monotonic() - announced >= 0.9


def test_a_drain_waits_for_a_call_in_flight(worker: WorkerAlone, port: int) -> None:
    requests: queue.Queue[bytes | None] = queue.Queue()
    with Client(port, KEY) as client:
        open_call: Any = client.channel.stream_unary("/avap.DefinitionEngine/GetCommand")
        answer = open_call.future(iter(requests.get, None), metadata=client.metadata, timeout=30)
        try:
            client.get("if")  # answered after the earlier headers were read
            assert worker.channel.send(messages.Drain(announce=False, wait_seconds=0, timeout_seconds=60))
            until(lambda: not listens(port), "the port closed")
            assert worker.process.poll() is None
            requests.put(b"\x0a\x02if")
        finally:
            requests.put(None)
        assert b"if" in answer.result(timeout=20)
    assert worker.process.wait(20) == 0


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return False
    return True


def test_before_it_has_keys_a_worker_refuses_every_call(configure: messages.Configure, port: int) -> None:
    worker = WorkerAlone(configure)
    try:
        worker.publish(built(1, "if"))
        until(lambda: worker.wait_ready() == 1, "the snapshot served")
        with Client(port, KEY) as client:
            assert failure(client.get, "if") == ("UNAUTHENTICATED", "Invalid Credentials")
    finally:
        worker.end()


def test_a_worker_writes_its_heartbeat_to_its_stats_page(worker: WorkerAlone) -> None:
    slot = worker.page
    first = slot.read()
    assert first.pid == worker.process.pid
    until(lambda: slot.read().heartbeat_ns > first.heartbeat_ns, "a beat", seconds=5)
    worker.process.send_signal(signal.SIGSTOP)
    try:
        stopped(worker.process.pid)
        still = slot.read().heartbeat_ns
        until(lambda: time.monotonic_ns() - still > 10**9, "a second")
        assert slot.read().heartbeat_ns == still
    finally:
        worker.process.send_signal(signal.SIGCONT)


def stopped(pid: int) -> None:
    path = Path(f"/proc/{pid}/stat")
    until(lambda: path.read_text().rpartition(")")[2].split()[0] == "T", "the process stopped")


def test_refused_and_replaced_snapshots_leave_no_descriptor_open(worker: WorkerAlone) -> None:
    for generation in range(2, 30):
        worker.publish(built(generation, "else"), announced="00" * 32)
        worker.publish(built(generation, "if"))
        until(lambda: worker.wait_ready() == generation, "the swap")  # noqa: B023 - asked at once
    until(lambda: worker.mappings() == 1, lambda: f"{worker.mappings()} mappings, one is wanted")


def test_sigint_does_not_end_a_worker(worker: WorkerAlone, port: int) -> None:
    worker.process.send_signal(signal.SIGINT)
    with Client(port, KEY) as client:
        assert client.get("if").name == "if"
    assert worker.process.poll() is None


def test_without_a_snapshot_a_worker_is_ready_but_not_serving(configure: messages.Configure, port: int) -> None:
    worker = WorkerAlone(configure, messages.Keys((sha256(KEY.encode()).hexdigest(),)))
    try:
        assert worker.wait_ready() == 0
        with Client(port, KEY) as client:
            assert client.health() == "NOT_SERVING"
            assert failure(client.get, "if")[0] == "UNAVAILABLE"
    finally:
        worker.end()


def test_the_native_transport_runs_on_uvloop_and_grpcio_on_asyncios_loop(configure: messages.Configure) -> None:
    worker = WorkerAlone(configure, before=REPORTING_UVLOOP)
    try:
        worker.wait_ready()
    finally:
        worker.end()
    assert bool(worker.logged("uvloop")) is (configure.transport == "native")


def test_a_failed_start_is_logged_and_has_its_own_exit_code(configure: messages.Configure, port: int) -> None:
    first = WorkerAlone(messages.Keys(()))
    with socket.create_server(("127.0.0.1", port)):
        second = WorkerAlone(configure)
        try:
            for worker, reason in ((first, "no configuration came first"), (second, f"127.0.0.1:{port}")):
                assert worker.process.wait(20) == EXIT_CANNOT_START
                line = until(lambda w=worker: w.logged("Worker cannot start"), lambda w=worker: str(w.lines))[0]
                assert line["level"] == "FATAL"
                assert reason in line["error"]
        finally:
            first.end()
            second.end()
