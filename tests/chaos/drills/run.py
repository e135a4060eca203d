"""Plays a drill."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from pathlib import Path

from tests.chaos.drills.load import DrillLoad, LoadFailed
from tests.chaos.drills.model import Fault, Outcome, Usage
from tests.chaos.drills.stage import Stage
from tests.support.polling import until

FELT_SECONDS = 20.0
"""How long a fault may take to be felt."""
MEMORY_SECONDS = 10.0
"""How long memory may take to come back: replaced snapshots are unmapped, rolled workers end."""
WARM_UP_VERSIONS = 2
MEMORY_SHARE, MEMORY_BYTES = 0.10, 8 << 20
DESCRIPTORS, THREADS = 4, 2
"""How far above the figures before the fault counts as back: allocators keep a little, connections come and go."""

PATIENCE = 1.5
"""How many times the limit fresh rows are waited for."""

PLAYED: list[Outcome] = []
"""Outcomes of this process, for the table at the end."""
RED: list[Outcome] = []
"""Those on servers that are broken on purpose, for a table of their own."""
_OURS = Path(__file__).parents[1]


def play(fault: Fault, stage: Stage, load_seconds: float = 2.0) -> Outcome:
    """Offer steady load, let ``fault`` happen, see what held. Noted in `PLAYED`; `judge.verdict` judges it.

    Args:
        fault: what to inject.
        stage: a server that serves; sound again afterwards, unless the outcome tells of trouble.
        load_seconds: for how long the load goes on while the fault lasts, once the fault is felt.

    Returns:
        What came of it. What goes wrong in the drill itself is its ``trouble``, not an exception.
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
    """`play`, and again where the machine was too busy to offer the load at its rate: such an outcome says nothing, and
    stays in the table as what it is. The last outcome."""
    for _ in range(attempts - 1):
        outcome = play(fault, stage, load_seconds)
        if not outcome.load.too_late:
            return outcome
    return play(fault, stage, load_seconds)


def play_red(fault: Fault, stage: Stage, bug: str, load_seconds: float = 2.0) -> Outcome:
    """`play` on a server that is broken on purpose, by ``bug``. Noted in `RED`."""
    outcome = play(fault, stage, load_seconds)
    PLAYED.remove(outcome)
    outcome.title = f"{outcome.title} [{bug}]"
    RED.append(outcome)
    return outcome


def _play(fault: Fault, stage: Stage, load: DrillLoad, load_seconds: float, outcome: Outcome) -> None:
    try:
        _warm_up(stage, load)
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
    """Where in the drills ``error`` came up, rather than where in a library."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_OURS)] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _warm_up(stage: Stage, load: DrillLoad) -> None:
    """Publish a few times, so that the memory of a publication is part of what is compared with."""
    if stage.table is None:
        load.keep(1)
        return
    for _ in range(WARM_UP_VERSIONS):
        version = stage.table.advance()
        written = time.monotonic()
        stage.cycle_took = load.wait_everywhere(version, 30 + 2 * stage.cycle_seconds) - written
    load.keep(0.7)  # a worker lets go of a replaced snapshot half a second later
    with suppress(AssertionError):  # and the master after some seconds; where it never does, the drill's end shows it
        until(lambda: _alone(stage.usage()), "only the current snapshot", seconds=MEMORY_SECONDS)


def _alone(now: Usage | None) -> bool:
    return now is None or now.memfds <= 1


def _felt(fault: Fault, stage: Stage) -> bool:
    assert fault.felt is not None
    with suppress(AssertionError):
        until(lambda: fault.felt(stage), fault.id, seconds=FELT_SECONDS)  # type: ignore[misc]
        return True
    return False


def _see_fresh(stage: Stage, load: DrillLoad, outcome: Outcome) -> None:
    """Write a new version and see how long it takes to reach every connection."""
    if stage.table is None:
        return
    outcome.fresh_limit_seconds = stage.cycle_seconds + outcome.allows.grace_seconds
    version = stage.table.advance()
    written = time.monotonic()
    before = stage.cycles()
    try:
        # Beyond the limit, so that the table tells how late it was, if not too late.
        came = load.wait_everywhere(version, PATIENCE * outcome.fresh_limit_seconds)
    except AssertionError:
        return
    outcome.fresh_seconds = came - written
    after = stage.cycles()
    if before is not None and after is not None and after >= before:
        outcome.fresh_cycles = after - before


def memory_back(before: Usage, now: Usage) -> bool:
    """Whether ``now`` is ``before`` again, within what an allocator keeps."""
    return (
        now.memory_bytes <= before.memory_bytes * (1 + MEMORY_SHARE) + MEMORY_BYTES
        and now.descriptors <= before.descriptors + DESCRIPTORS
        and now.threads <= before.threads + THREADS
        and now.memfds <= before.memfds
    )


def _see_memory(stage: Stage, outcome: Outcome) -> None:
    """Wait until memory is back, for a while; what it is then."""
    before = outcome.before

    def look() -> bool:
        outcome.after = stage.usage()
        return before is None or outcome.after is None or memory_back(before, outcome.after)

    # Where fresh rows did not come, the drill is lost already.
    patience = MEMORY_SECONDS if outcome.fresh_seconds is not None or stage.table is None else 1.0
    with suppress(AssertionError):
        until(look, "memory back", seconds=patience)
