"""The warm-up makes a client's first calls; afterwards all objects are frozen, and the collector's threshold fits."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import weakref
from typing import Any

import pytest

from definition_server.data_plane import warmup
from definition_server.ipc.messages import Configure

# In a process of its own, because all code of a process shares one garbage collector.
PROGRAM = """
import asyncio, gc, json, sys
from definition_server.data_plane import warmup
from definition_server.data_plane.warmup import WarmUp
from definition_server.ipc.messages import Configure
from definition_server.observability.logs import configure_logs
configure_logs("production", "INFO")
slots, unshared = [], warmup.unshared_slot
warmup.unshared_slot = lambda: slots.append(unshared()) or slots[-1]
before = gc.get_threshold()[0]
asyncio.run(WarmUp(Configure("127.0.0.1", 0, sys.argv[1], False, 0.0, 4, "production", "INFO", 5.0)).run())
counted = slots[0].read()
print(json.dumps({
    "frozen": gc.get_freeze_count(), "before": before, "threshold": gc.get_threshold()[0], "enabled": gc.isenabled(),
    "requests": {status: number for status, number in counted.requests.items() if number},
    "methods": {method: sum(buckets) for method, buckets in counted.latency.items()},
}))
"""


NO_IPV4 = """
import errno, socket
def refuse(*args, **options):
    raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
socket.create_server = refuse
"""


def warmed_up(transport: str, before: str = "") -> dict[str, Any]:
    """The figures of a process after the warm-up of ``transport``; ``before`` is run first."""
    done = subprocess.run(
        [sys.executable, "-c", before + PROGRAM, transport], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # and no log line, because no client made the calls
    # gRPC's core may say how the warm-up's own connection ended.
    assert [line for line in done.stderr.splitlines() if "chttp2_transport.cc" not in line] == []
    shown: dict[str, Any] = json.loads(line)
    return shown


@pytest.mark.parametrize(("name", "young"), [("native", 5000), ("grpcio", None)], ids=["native", "grpcio"])
def test_warm_up_freezes_existing_objects_and_raises_the_gc_threshold(name: str, young: int | None) -> None:
    shown = warmed_up(name)
    assert shown["frozen"] > 10_000
    assert shown["threshold"] == (young or shown["before"]), "None: as the interpreter has it"
    assert shown["enabled"], "connections that begin and end make reference cycles"


@pytest.mark.parametrize("name", ["native", "grpcio"])
def test_warm_up_makes_every_kind_of_first_call_once(name: str) -> None:
    """A call that is found, one that is not, a refused one, and a catalogue. (Health is not counted on the stats
    page.)"""
    shown = warmed_up(name)
    assert shown["requests"] == {"200": 2, "404": 1, "401": 1}
    assert shown["methods"] == {"GetCommand": 3, "SyncCatalog": 1}


def test_on_a_host_without_ipv4_the_same_first_calls_are_made() -> None:
    assert warmed_up("native", NO_IPV4)["requests"] == {"200": 2, "404": 1, "401": 1}


class Broken:
    """A transport that cannot start, and notes how it was stopped."""

    def __init__(self) -> None:
        self.stopped: list[float] = []

    async def start(self) -> None:
        raise OSError("no descriptor is left")

    async def stop(self, timeout: float) -> None:
        self.stopped.append(timeout)


async def test_a_warm_up_that_fails_stops_its_transport_and_lets_messages_be_logged_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Broken()
    monkeypatch.setattr(warmup, "create_transport", lambda *_: broken)
    config = Configure("127.0.0.1", 0, "grpcio", False, 0.0, 4, "production", "INFO", 5.0)
    with pytest.raises(OSError, match="no descriptor"):
        await warmup.WarmUp(config).run()
    assert broken.stopped == [0]
    assert logging.root.manager.disable == logging.NOTSET


class Cycle:
    """An object that only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self


class Littering(Broken):
    """A transport whose stop leaves a `Cycle`."""

    async def start(self) -> None:
        pass

    async def set_serving(self, serving: bool) -> None:
        pass

    async def call_all_paths(self, *_: object) -> None:
        assert logging.root.manager.disable == logging.INFO, "no line about the worker as its own client"

    async def stop(self, timeout: float) -> None:
        self.litter = weakref.ref(Cycle())


async def test_the_garbage_of_a_warm_up_is_collected_before_all_other_objects_are_frozen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    littering, left = Littering(), list[Cycle | None]()
    monkeypatch.setattr(warmup, "create_transport", lambda *_: littering)
    monkeypatch.setattr(gc, "freeze", lambda: left.append(littering.litter()))
    config = Configure("127.0.0.1", 0, "grpcio", False, 0.0, 4, "production", "INFO", 5.0)
    await warmup.WarmUp(config).run()
    assert left == [None], "an object that is frozen is never freed"
    assert logging.root.manager.disable == logging.NOTSET
