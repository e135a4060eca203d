"""The spans of a sync cycle, each with its facts. No other test would notice a missing span."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.fakes import FakeSource
from tests.support.snapshots import row
from tests.unit.definition_server.control_plane.publication_server import ALL, FEW, HoldingGate, Server

from definition_server.control_plane.source import SourceError
from definition_server.observability.reasons import Reason
from definition_server.observability.tracing import Recorder, Span, record_to

pytestmark = pytest.mark.usefixtures("nothing_is_left")
SERVED = {"generation": 1, "definitions": 40}

Taken = Callable[[], dict[str, Span]]


@pytest.fixture
def taken() -> Iterator[Taken]:
    """Name → span, for each span that has ended since the last call."""
    recorder = Recorder()
    record_to(recorder)
    yield lambda: {each.name: each for each in recorder.take()}
    record_to(None)


def facts(spans: dict[str, Span], **more: Any) -> dict[str, Any]:
    return {name: each.attributes for name, each in spans.items()} | more


async def test_a_cycle_that_publishes_has_a_span_of_each_step(server: Server, taken: Taken) -> None:
    await server.cycle()
    spans = taken()
    assert facts(spans) == {
        "check": {"changed": True},
        "read": {"rows": 40},
        "build": {"definitions": 40},
        "guard": {"passed": True},
        "publish": SERVED | {"version_hash": server.version},
        "store": {},
        "sync cycle": {"unconditional": False, "outcome": "published", "generation": 1},
    }
    assert not any(each.events or each.failure for each in spans.values())
    cycle = spans["sync cycle"]
    assert {each.parent_id for each in spans.values() if each is not cycle} == {cycle.span_id}


async def test_a_cycle_that_finds_no_change_has_only_the_span_of_the_check(server: Server, taken: Taken) -> None:
    await server.cycle()
    taken()
    await server.synchronizer.cycle(lambda _: 60.0)
    assert facts(taken()) == {
        "check": {"changed": False},
        "sync cycle": {"unconditional": False, "outcome": "unchanged", "generation": 1},
    }
    await server.synchronizer.cycle(lambda _: 60.0, unconditional=True)
    spans = taken()
    assert spans.keys() == {"check", "read", "build", "sync cycle"}
    assert spans["sync cycle"].attributes["unconditional"] is True


async def test_the_span_of_a_held_cycle_has_the_version_and_the_reason(server: Server, taken: Taken) -> None:
    await server.cycle()
    taken()
    await server.cycle(*FEW)
    spans = taken()
    assert spans["guard"].attributes == {"passed": False}
    (event,) = spans["guard"].events
    assert event.name == "catalogue held"
    assert event.attributes == {"version_hash": server.held, "reason": Reason.CATALOGUE_SHRUNK}
    assert spans["sync cycle"].attributes == {
        "unconditional": False, "outcome": "held", "reason": Reason.CATALOGUE_SHRUNK, "generation": 1,
    }  # fmt: skip
    assert spans["sync cycle"].failure is None


async def test_a_cycle_that_fails_has_its_reason(server: Server, taken: Taken) -> None:
    server.source.fail(SourceError("no route", Reason.DATABASE_UNREACHABLE))
    await server.cycle()
    spans = taken()
    assert spans.keys() == {"check", "sync cycle"}
    assert spans["sync cycle"].failure == Reason.DATABASE_UNREACHABLE
    assert spans["sync cycle"].attributes == {
        "unconditional": False, "outcome": "failed", "reason": Reason.DATABASE_UNREACHABLE,
    }  # fmt: skip


async def test_the_gates_span_has_the_number_of_held_rows_and_names_ten_of_them(tmp_path: Any, taken: Taken) -> None:
    server = Server(tmp_path, FakeSource(*ALL[:-1], row("", "no name")))
    gate = HoldingGate()
    server.options = {"gate": gate}
    server.restart()
    await server.cycle()
    gates = taken()["gate"]
    assert gates.attributes == {"held": 0, "left_out": 1}
    assert gates.events == []
    gate.names = frozenset(each.name or b"" for each in ALL[:11])
    server.source.touch()
    await server.cycle()
    gates = taken()["gate"]
    assert gates.attributes["held"] == 11
    (event,) = gates.events
    assert event.name == "commands held"
    assert event.attributes == {"names": ", ".join(f"c{number:02}" for number in range(10))}
    server.close()
