"""The engine under simulation: hundreds of seeds pass, a seed gives the same run each time, injected bugs are found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.simulation.engine.plan import draw_plan
from tests.simulation.engine.world import Failure, World, run_seed
from tests.support.families import sample

ROOT = Path(__file__).parents[3]
SEEDS = int(os.environ.get("SIMULATION_SEEDS", "200"))
PIECES = 10


@pytest.mark.requirement("A20", "A22")
@pytest.mark.parametrize("piece", sample(range(PIECES), 4))
def test_every_seed_has_the_planned_outcomes(piece: int) -> None:
    for seed in range(piece, SEEDS, PIECES):
        run_seed(seed)


@pytest.mark.requirement("A7", "A40")
@pytest.mark.parametrize("seed", range(1000, 1004))
def test_the_outcomes_do_not_depend_on_how_octets_are_divided(seed: int) -> None:
    expected = run_seed(seed, "whole").outcomes()
    assert run_seed(seed, "random").outcomes() == expected
    assert run_seed(seed, "octets").outcomes() == expected


def test_a_seed_replays_exactly() -> None:
    for seed in range(3):
        traces: list[list[str]] = [[], []]
        for trace in traces:
            run_seed(seed, trace=trace.append)
        assert traces[0] == traces[1]
        assert len(traces[0]) > 10


def test_another_seed_is_another_run() -> None:
    traces: list[list[str]] = [[], []]
    for seed, trace in enumerate(traces):
        run_seed(seed, trace=trace.append)
    assert traces[0] != traces[1]


def test_a_failure_names_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "_judge", lambda self: 1 / 0)
    with pytest.raises(Failure, match=r"seed 7: ZeroDivisionError(.|\n)*--start 7 --seeds 1 --network random --trace"):
        run_seed(7)


def test_hundreds_of_seeds_exercise_every_kind_of_event() -> None:
    plans = [draw_plan(seed) for seed in range(200)]
    clients = [client for plan in plans for client in plan.clients]
    calls = [call for client in clients for call in client.calls]
    for wanted in (
        any(client.lost_after is not None for client in clients),
        any(client.drained_after is not None for client in clients),
        any(client.changes for client in clients),
        any(client.pings for client in clients),
        any(call.cancel_after is not None for call in calls),
        any(call.ping_pong for call in calls),
        any(call.linger for call in calls),
        any(client.rests for client in clients),
        {call.status for call in calls} >= {0, 4, 5, 7, 8, 12, 13, 16},
        {call.reset for call in calls} >= {None, 1, 8},
    ):
        assert wanted


@pytest.mark.thorough  # takes seconds
def test_a_hundred_seeds_reach_every_limit_of_time_and_number() -> None:
    happened = set().union(*(run_seed(seed).happenings() for seed in range(100)))
    assert happened == {"asked", "age", "idle", "grace", "too late", "refused", "answered by headers"}


# -- injected bugs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: a line of the package, in any module, and its replacement."""

    within: int
    """Number of seeds, one of which must show the bug."""
    line: str
    """A regular expression for the line without its indentation. Its groups count from 2."""
    instead: str


MUTANTS = {
    "unread octets off by a sign": Mutant(100, r"self\.unread -= cost", "self.unread += cost"),
    "unread octets counted down": Mutant(100, r"self\.unread \+= cost", "self.unread -= cost"),
    "unread octets of an ended call kept": Mutant(200, r"self\.unread -= unread", "pass"),
    "window of the connection not given back": Mutant(
        100, r"increment = self\._flow\.give_back\(octets\)", "increment = 0"
    ),
    "window of a stream not given back": Mutant(100, r"self\.credit \+= free", "pass"),
    "trailers lost where they had to wait": Mutant(20, r"if stream\.trailers:", "if False:"),
    "WINDOW_UPDATE of a stream lost": Mutant(50, r"self\.send_window = window", "pass"),
    "octets of a cut frame lost": Mutant(
        20,
        r"self\.held, self\.position = data\[position:\], 0",
        'self.held, self.position = b"", 0',
    ),
    "fields of a block in parts kept for the next one": Mutant(
        60,
        r"known = self\.memo\.get\(block\) if self\._ahead is None and (.*)",
        r"known = self.memo.get(block) if \g<2>",
    ),
    "a handler that counts as running for ever": Mutant(20, r"self\.open_calls -= 1", "pass"),
    "a paused transport that is written to": Mutant(100, r"self\.paused = paused", "pass"),
    "a connection that does not age": Mutant(50, r"\(self\._age_at, Due\.AGE\),", "(inf, Due.AGE),"),
    "an age that varies the wrong way": Mutant(
        50, r"(self\._age_at = .*)\(1 \+ limits(.*)\)", r"\g<2>(1 - limits\g<3>)"
    ),
    "calls of an aged connection that have too little time": Mutant(
        200, r"self\._grace_at = self\.now \+ self\._limits\.age_grace", "self._grace_at = self.now"
    ),
    "calls of an aged connection that have time for ever": Mutant(
        200, r"\(self\._grace_at, Due\.GRACE\),", "(inf, Due.GRACE),"
    ),
    "idleness that counts from the beginning": Mutant(100, r"self\._timers\.stream_ended\(\)", "pass"),
    "idleness although a call is open": Mutant(100, r"(\(self\._idle_at .*) if idle else inf(, .*)", r"\g<2>\g<3>"),
    "idleness that nobody notices": Mutant(100, r"\(self\._idle_at .*", "(inf, Due.IDLE),"),
    "a body that is waited for without end": Mutant(100, r"self\._expected\[stream\] = min\(self.*", "pass"),
    "a body that is waited for without end on the fast path": Mutant(
        200, r"self\._marks\.append\(\(instant, last_id\)\)", "pass"
    ),
    "a body that has the time of a drain": Mutant(
        100, r"return self\._limits\.drain_body_timeout if draining.*", "return self._limits.drain_body_timeout"
    ),
    "streams beyond the limit": Mutant(100, r"if self\._calls\.open_streams \+ streams\.zombies >= .*", "if False:"),
    "handlers of streams that were reset not counted": Mutant(
        300, r"if self\._calls\.open_streams \+ streams\.zombies (>= .*)", r"if self._calls.open_streams \g<2>"
    ),
    "streams refused below the limit": Mutant(
        100, r"(if self\._calls\.open_streams) (\+ streams\.zombies >= .*)", r"\g<2> + 1 \g<3>"
    ),
    "a refusal that waits for the body": Mutant(50, r"self\._refusable\.append\(stream\)", "pass"),
    "a refusal that waits for the body on the fast path": Mutant(
        200,
        r"streams, waiting = self\._streams\.open, self\._fast_path\.refused\(\)",
        "streams, waiting = self._streams.open, []",
    ),
}


def mutated_package(folder: Path, mutant: Mutant) -> int:
    """A copy of the package with the bug in it, in ``folder``. Returns how many lines were replaced."""
    shutil.copytree(ROOT / "service/grpc_h2", folder / "grpc_h2", ignore=shutil.ignore_patterns("__pycache__"))
    replaced = 0
    for path in (folder / "grpc_h2").rglob("*.py"):
        source = path.read_text()
        source, count = re.subn(rf"^(\s*){mutant.line}$", rf"\g<1>{mutant.instead}", source, flags=re.MULTILINE)
        replaced += count
        path.write_text(source)
    return replaced


@pytest.mark.parametrize("name", sample(MUTANTS, 4))
def test_an_injected_bug_is_found(tmp_path: Path, name: str) -> None:
    mutant = MUTANTS[name]
    assert mutated_package(tmp_path, mutant), "the line is no longer there: write the bug into the code as it is now"
    command = [sys.executable, "-m", "tests.simulation.engine", "--seeds", str(mutant.within)]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, f"{mutant.within} seeds passed: {done.stdout}"
    assert re.search(r"^seed \d+: AssertionError", done.stdout, re.MULTILINE), done.stdout + done.stderr
