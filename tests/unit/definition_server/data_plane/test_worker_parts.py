"""Small parts of a worker that only a process with a master uses."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from definition_server.data_plane import confine, worker
from definition_server.data_plane.transports import grpcio
from definition_server.ipc.messages import Configure
from definition_server.jail.confinement import Extent

CONFIG = Configure("127.0.0.1", 0, "grpcio", False, 0.0, 4, "production", "INFO", 5.0)


def test_the_listening_socket_of_the_master_is_inherited_by_no_further_process() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        descriptor = os.dup(listening.fileno())
        os.set_inheritable(descriptor, True)
        with worker._inherited_listener(descriptor) as inherited:
            assert inherited.fileno() == descriptor
            assert not os.get_inheritable(descriptor)
            assert inherited.getsockname() == listening.getsockname()


class Jail:
    """A jail that reaches the extent that the test sets; the kernel refuses nothing."""

    def __init__(self, extent: Extent) -> None:
        self.reached = self
        self.extent = extent

    def enter(self) -> list[str]:
        return []


@pytest.mark.parametrize("jail", ["auto", "require"])
@pytest.mark.parametrize("extent", [each for each in Extent if each is not Extent.NONE])
def test_only_jail_require_refuses_to_serve_if_the_confinement_is_not_complete(
    jail: str, extent: Extent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confine, "preload", lambda _: None)
    monkeypatch.setattr(confine, "Jail", lambda *_, **__: Jail(extent))
    made = confine.Confinement(replace(CONFIG, jail=jail), tls=False)
    if jail == "require" and extent is not Extent.FULL:
        with pytest.raises(confine.CannotConfine, match="JAIL is require"):
            made.enter()
    else:
        made.enter()
        assert made.extent is extent


@pytest.mark.parametrize(
    ("option", "setting", "milliseconds"),
    [
        ("grpc.max_connection_idle_ms", {"max_connection_idle_seconds": 1.5}, 1500),
        ("grpc.max_connection_age_ms", {"max_connection_age_seconds": 2.25}, 2250),
        ("grpc.max_connection_age_grace_ms", {"max_connection_age_seconds": 1.0, "drain_timeout_seconds": 5.5}, 5500),
        ("grpc.keepalive_time_ms", {"keepalive_time_seconds": 7.5}, 7500),
        ("grpc.keepalive_timeout_ms", {"keepalive_timeout_seconds": 3.5}, 3500),
    ],
    ids=["idle", "age", "grace", "keepalive", "keepalive timeout"],
)
def test_a_setting_in_seconds_reaches_grpcio_in_milliseconds(
    option: str, setting: dict[str, float], milliseconds: int
) -> None:
    assert dict(grpcio._options(replace(CONFIG, **setting)))[option] == milliseconds


async def test_a_heartbeat_carries_the_number_of_lost_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    slot = SimpleNamespace(beat=lambda _: None, lines_dropped=noted.append)
    monkeypatch.setattr(worker, "dropped_lines", lambda: 7)
    beating = asyncio.create_task(worker.Worker._beat(cast(Any, SimpleNamespace(_slot=slot))))
    await asyncio.sleep(0)
    beating.cancel()
    await asyncio.wait((beating,))
    assert noted == [7]


async def test_sampled_calls_are_sent_to_the_master_if_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, sent = iter((None, "the calls")), list[str]()
    worker_of_a_test = SimpleNamespace(
        _sampled=SimpleNamespace(take=lambda: next(taken, None)), _channel=SimpleNamespace(send=sent.append)
    )
    monkeypatch.setattr(worker, "_CALLS_REPORT_SECONDS", 0)
    reporting = asyncio.create_task(worker.Worker._report_calls(cast(Any, worker_of_a_test)))
    for _ in range(5):
        await asyncio.sleep(0)
    reporting.cancel()
    await asyncio.wait((reporting,))
    assert sent == ["the calls"]
