"""A pin's catalogue and its end, with stand-ins for wishes, disk and clock."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.logs import LogLines, logged
from tests.support.loop import eventually

from definition_server.control_plane.pinned_catalogue import PinnedCatalogue
from definition_server.control_plane.sync_state import PinState, SyncState
from definition_server.control_plane.wishes import Pin

VERSION = "ab" * 32


class Bench:
    """A pinned catalogue of a server that serves nothing."""

    def __init__(self) -> None:
        self.pin: Pin | None = None
        self.served: Any = None
        self.state = SyncState()
        self.now = 1000.0
        self.ends = 0
        self.bug: Exception | None = None
        self.disk = SimpleNamespace(entries=())
        self.catalogue = PinnedCatalogue(
            cast(Any, SimpleNamespace(now=lambda: SimpleNamespace(pin=self.pin))), cast(Any, self.disk), self.state,
            served=lambda: self.served, newest=lambda: None, signer=lambda: None, on_end=self._end,
            clock=lambda: self.now,
        )  # fmt: skip

    async def _end(self) -> None:
        self.ends += 1
        if self.bug is not None:
            raise self.bug

    def seconds_left(self) -> float | None:
        """Seconds until the timer is due; None if there is no timer."""
        timer = self.catalogue._timer
        return None if timer is None else timer.when() - asyncio.get_running_loop().time()


@pytest.fixture
async def bench() -> Any:
    made = Bench()
    yield made
    made.catalogue.close()


@pytest.mark.parametrize(
    ("until", "seconds"),
    [(1060.0, 60.001), (1000.0, 0.001), (900.0, 0.001), (1000.0 + 7200, 3600.0)],
    ids=["in a minute", "now", "long ago", "in two hours"],
)
async def test_a_pin_is_checked_again_when_it_ends_and_after_an_hour_at_the_latest(
    bench: Bench, until: float, seconds: float
) -> None:
    bench.pin = Pin(VERSION, until)
    bench.catalogue.show()
    left = bench.seconds_left()
    assert left is not None
    assert left <= seconds
    assert left == pytest.approx(seconds, abs=1.0)
    if seconds < 1:
        await eventually(lambda: bench.ends == 1, "the end of the pin")


async def test_a_pin_without_an_end_has_no_timer_and_a_new_pin_replaces_the_timer(bench: Bench) -> None:
    bench.pin = Pin(VERSION, bench.now + 60)
    bench.catalogue.show()
    first = bench.catalogue._timer
    assert first is not None
    bench.pin = Pin(VERSION, bench.now + 90)
    bench.catalogue.show()
    second = bench.catalogue._timer
    assert first.cancelled()
    assert second is not None
    bench.pin = Pin(VERSION)
    bench.catalogue.show()
    assert second.cancelled()
    assert bench.seconds_left() is None


async def test_nothing_happens_at_the_end_of_a_pin_once_the_server_has_stopped(bench: Bench) -> None:
    bench.pin = Pin(VERSION, bench.now)
    bench.catalogue.show()
    timer = bench.catalogue._timer
    assert timer is not None
    bench.catalogue.close()
    assert timer.cancelled()
    bench.catalogue._on_timer()
    expiring = bench.catalogue._expiring
    assert expiring is not None
    bench.catalogue.close()
    await asyncio.wait((expiring,))
    assert expiring.cancelled()
    assert bench.ends == 0


async def test_a_bug_at_the_end_of_a_pin_is_logged(bench: Bench, logs: LogLines) -> None:
    bench.bug = RuntimeError("a bug")
    await bench.catalogue._expire()
    assert logged(logs, "Unexpected failure at the end of a pin", log_level="error")


async def test_a_pin_by_an_operator_and_its_removal_are_logged(bench: Bench, logs: LogLines) -> None:
    snapshot = cast(Any, SimpleNamespace(version_hash=VERSION))
    bench.catalogue.change(Pin(VERSION, 0.0), snapshot)
    assert bench.catalogue.snapshot is snapshot
    (line,) = logged(logs, "Catalogue pinned", log_level="warning")
    assert (line["version_hash"], line["until"]) == (VERSION, "1970-01-01T00:00:00+00:00")
    bench.catalogue.change(None, None)
    assert bench.catalogue.snapshot is snapshot, "the catalogue is kept until the served one is chosen again"
    assert logged(logs, "Pin taken away", log_level="warning")


async def test_a_pin_of_an_unknown_version_has_no_effect_until_the_version_is_known(
    bench: Bench, logs: LogLines
) -> None:
    bench.pin = Pin(VERSION, None, "policy")
    await bench.catalogue.find()
    await bench.catalogue.find()
    (line,) = logged(logs, "Pinned catalogue not served")
    assert line["error"] == "it is not in the history of this server"
    assert line["effect"] == "the table is followed until the version is known or the pin ends"
    bench.catalogue.show()
    assert bench.state.pin == PinState(VERSION, None, "policy", missing=True, vain=True)
    bench.served = SimpleNamespace(version_hash=VERSION)
    assert bench.catalogue.in_memory(bench.pin) is bench.served
    bench.catalogue.show()
    assert bench.state.pin == PinState(VERSION, None, "policy", missing=False, vain=False)
    bench.served = SimpleNamespace(version_hash="cd" * 32)
    bench.catalogue.show()
    assert bench.state.pin == PinState(VERSION, None, "policy", missing=True, vain=False)
    await bench.catalogue.find()
    assert len(logged(logs, "Pinned catalogue not served")) == 2, (
        "it is logged again, because the version was known meanwhile"
    )
    assert logged(logs, "Pinned catalogue not served")[1]["effect"].startswith("the served catalogue stays, until")


async def test_the_end_of_a_pin_is_logged_once_if_the_pin_was_shown(bench: Bench, logs: LogLines) -> None:
    bench.catalogue.show()
    assert not logged(logs, "Pin has ended")
    bench.pin = Pin(VERSION)
    bench.catalogue.change(bench.pin, cast(Any, SimpleNamespace(version_hash=VERSION)))
    bench.catalogue.show()
    bench.pin = None
    bench.catalogue.show()
    bench.catalogue.show()
    assert len(logged(logs, "Pin has ended", version_hash=VERSION, source="command")) == 1
    assert bench.catalogue.snapshot is None
    assert bench.state.pin is None


async def test_a_pin_that_is_replaced_while_the_disk_is_read_is_not_kept(bench: Bench) -> None:
    loaded = SimpleNamespace(version_hash=VERSION)
    asked: list[str] = []

    async def load_version(version: str, _: object) -> Any:
        asked.append(version)
        if len(asked) == 1:
            bench.pin = Pin("cd" * 32)
        return loaded

    bench.disk.entries = (SimpleNamespace(version_hash="ef" * 32), SimpleNamespace(version_hash=VERSION))
    bench.disk.load_version = load_version
    bench.pin = Pin(VERSION[:8])
    await bench.catalogue.find()
    assert bench.catalogue.snapshot is None
    bench.pin = Pin(VERSION[:8])
    await bench.catalogue.find()
    assert bench.catalogue.snapshot is loaded
    await bench.catalogue.find()
    assert asked == [VERSION, VERSION], "the catalogue is in memory"
