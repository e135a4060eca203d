"""Runs a drill."""

from __future__ import annotations

import re
import time
import traceback
from contextlib import suppress
from pathlib import Path

from tests.chaos.drills.load import DrillLoad, LoadFailed
from tests.chaos.drills.model import Fault, Outcome, Usage
from tests.chaos.drills.stage import Stage
from tests.support.polling import until

FELT_SECONDS = 20.0
"""Time until a fault must have an effect."""
MEMORY_SECONDS = 10.0
"""Time for memory to return to its value before: replaced snapshots are unmapped, replaced workers exit."""
WARM_UP_VERSIONS = 2
MEMORY_SHARE, MEMORY_BYTES = 0.10, 8 << 20
DESCRIPTORS, THREADS = 4, 2
"""Allowed excess over the figures before the fault: allocators keep a little, connections change."""

PATIENCE = 1.5
"""How many times the limit the drill waits for fresh rows."""

PLAYED: list[Outcome] = []
"""Outcomes of this process, for the table at the end."""
RED: list[Outcome] = []
"""Outcomes on servers with a deliberate defect, for a separate table."""
_OURS = Path(__file__).parents[1]
_UNFIT = re.compile(r"(unexpected )?(AttributeError|ImportError|NameError|TypeError)\b")
"""Errors that show a deliberate defect that no longer fits the server's code."""


def play(fault: Fault, stage: Stage, load_seconds: float = 2.0) -> Outcome:
    """Offer steady load, make ``fault``, and record the outcome in `PLAYED`; `judge.verdict` judges it.

    Args: fault: what to inject. stage: a server that serves; it serves again afterwards, unless the outcome reports
    trouble. load_seconds: how long the fault lasts after its first effect.

    Returns: The outcome. An error in the drill itself is its ``trouble``, not an exception.
    """
    outcome = Outcome(fault.id, fault.title, fault.kind, stage.transport, stage.provider, fault.allows)
    stage.wounds, stage.broken = outcome.wounds, outcome.broken
    load = DrillLoad(stage.job or stage.default_job())
    try:
        with load:
            stage.load = load
            _play(fault, stage, load, load_seconds, outcome)
    except LoadFailed as error:
        outcome.trouble = str(error)
    finally:
        stage.load = None
    outcome.load = load.report
    if stage.table is not None:
        outcome.written = list(stage.table.written)
    PLAYED.append(outcome)
    return outcome


def play_until_valid(fault: Fault, stage: Stage, load_seconds: float = 2.0, attempts: int = 3) -> Outcome:
    """Call `play`, and repeat it if the machine was too busy to offer the load at its rate: such an outcome is invalid,
    and stays in the table as invalid. Returns the last outcome.
    """
    for _ in range(attempts - 1):
        outcome = play(fault, stage, load_seconds)
        if not outcome.load.too_late:
            return outcome
    return play(fault, stage, load_seconds)


def play_red(fault: Fault, stage: Stage, bug: str, load_seconds: float = 2.0) -> Outcome:
    """`play` on a server with the deliberate defect ``bug``. Recorded in `RED`.

    Raises:
        AssertionError: the server fails because ``bug`` replaces code that has been changed.
    """
    outcome = play(fault, stage, load_seconds)
    PLAYED.remove(outcome)
    outcome.title = f"{outcome.title} [{bug}]"
    RED.append(outcome)
    errors = [] if stage.server is None else [str(line.get("error")) for line in stage.server.lines]
    unfit = [error for error in errors if _UNFIT.match(error)]
    assert not unfit, f"the defect {bug} does not fit the server: {unfit[0]}"
    return outcome


def _play(fault: Fault, stage: Stage, load: DrillLoad, load_seconds: float, outcome: Outcome) -> None:
    try:
        _warm_up(stage, load)
        if fault.first_time_mib is not None and fault.allows.memory and stage.table is not None:
            _first_time(fault, stage, load, load_seconds, outcome)
        outcome.before = stage.usage()
        stage.first_line = 0 if stage.server is None else len(stage.server.lines)
        began = time.monotonic()
        with fault.inject(stage):
            if fault.felt is not None:
                outcome.felt = _felt(fault, stage)
            load.keep(load_seconds)
        outcome.fault_seconds = time.monotonic() - began
        _see_fresh(stage, load, outcome)
        _see_memory(stage, outcome)
        load.keep(0.3)
    except LoadFailed:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the outcome, and the load must be stopped
        outcome.trouble = f"{type(error).__name__} at {_place(error)}: {error}"


def _place(error: Exception) -> str:
    """The place in the drills, not in a library, where ``error`` was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_OURS)] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _warm_up(stage: Stage, load: DrillLoad) -> None:
    """Publish several times, so that the memory of a publication is part of the baseline."""
    if stage.table is None:
        load.keep(1)
        return
    for _ in range(WARM_UP_VERSIONS):
        version = stage.table.advance()
        written = time.monotonic()
        stage.cycle_took = load.wait_everywhere(version, 30 + 2 * stage.cycle_seconds) - written
    load.keep(0.7)  # a worker releases a replaced snapshot half a second later
    with suppress(AssertionError):  # the master releases it after some seconds; otherwise the drill reports a leak
        until(lambda: _alone(stage.usage()), "only the current snapshot", seconds=MEMORY_SECONDS)


def _alone(now: Usage | None) -> bool:
    return now is None or now.memfds <= 1


def _felt(fault: Fault, stage: Stage) -> bool:
    assert fault.felt is not None
    with suppress(AssertionError):
        until(lambda: fault.felt(stage), fault.id, seconds=FELT_SECONDS)
        return True
    return False


def _first_time(fault: Fault, stage: Stage, load: DrillLoad, load_seconds: float, outcome: Outcome) -> None:
    """Make the fault once before the drill judges the memory."""
    outcome.fresh_server, outcome.first_time_mib = stage.usage(), fault.first_time_mib
    with fault.inject(stage):
        load.keep(load_seconds)
    with suppress(AssertionError):  # if the memory grows beyond this, the judge reports it
        until(lambda: first_time_kept(outcome, stage.usage()), "memory of a first time", seconds=MEMORY_SECONDS)


def first_time_kept(outcome: Outcome, now: Usage | None) -> bool:
    """Whether the first fault enlarged the processes by no more than is allowed, and left no descriptors behind."""
    fresh, mib = outcome.fresh_server, outcome.first_time_mib
    if fresh is None or now is None or mib is None:
        return True
    return now.memory_bytes - fresh.memory_bytes <= mib << 20 and now.descriptors <= fresh.descriptors + DESCRIPTORS


def _see_fresh(stage: Stage, load: DrillLoad, outcome: Outcome) -> None:
    """Write a new version and measure the time until every connection sees it."""
    if stage.table is None:
        return
    outcome.fresh_limit_seconds = stage.cycle_seconds + outcome.allows.grace_seconds
    version = stage.table.advance()
    written = time.monotonic()
    before = _cycles(stage)
    try:
        # The wait is longer than the limit, so that the table can show the delay.
        came = load.wait_everywhere(version, PATIENCE * outcome.fresh_limit_seconds)
    except AssertionError:
        return  # this is a broken promise even if the status page does not answer
    outcome.fresh_seconds = came - written
    after = _cycles(stage)
    for each in (before, after):
        if isinstance(each, Exception):
            raise each
    if isinstance(before, int) and isinstance(after, int) and after >= before:
        outcome.fresh_cycles = after - before


def _cycles(stage: Stage) -> int | Exception | None:
    """`Stage.cycles`, or the error if the status page does not answer with a status."""
    try:
        return stage.cycles()
    except (OSError, ValueError) as error:
        return error


def memory_back(before: Usage, now: Usage) -> bool:
    """Whether ``now`` equals ``before``, except for what an allocator keeps."""
    return (
        now.memory_bytes <= before.memory_bytes * (1 + MEMORY_SHARE) + MEMORY_BYTES
        and now.descriptors <= before.descriptors + DESCRIPTORS
        and now.threads <= before.threads + THREADS
        and now.memfds <= before.memfds
    )


def _see_memory(stage: Stage, outcome: Outcome) -> None:
    """Wait for a limited time until memory has returned to its earlier value. Returns the last value."""
    before = outcome.before

    def look() -> bool:
        outcome.after = stage.usage()
        return before is None or outcome.after is None or memory_back(before, outcome.after)

    # If fresh rows were not served, the drill has failed already.
    patience = MEMORY_SECONDS if outcome.fresh_seconds is not None or stage.table is None else 1.0
    with suppress(AssertionError):
        until(look, "memory back", seconds=patience)
