"""Publication under simulation: hundreds of days pass, a seed gives the same day each time, injected bugs are found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.simulation.publication.promises import Promises
from tests.simulation.publication.world import Failure, run_seed, signer_of
from tests.support.families import sample
from tests.support.leftovers import nothing_left

ROOT = Path(__file__).parents[3]
DAYS = int(os.environ.get("SIMULATION_DAYS", "20"))
"""CI runs 420: 10,000 hours."""

PIECES = 10
EVERY_PIECE = (
    [pytest.param(piece, marks=pytest.mark.thorough) for piece in range(PIECES)]
    if "SIMULATION_DAYS" in os.environ
    else sample(range(PIECES), 5)
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("piece", EVERY_PIECE)
def test_every_day_keeps_every_promise(piece: int) -> None:
    for seed in range(piece, DAYS, PIECES):
        run_seed(seed)


def test_a_seed_replays_exactly() -> None:
    for seed in range(2):
        traces: list[list[str]] = [[], []]
        for trace in traces:
            run_seed(seed, trace.append)
        assert traces[0] == traces[1]
        assert len(traces[0]) > 50


def test_days_with_and_without_a_signing_key_are_simulated() -> None:
    signed = [signer_of(seed) is not None for seed in range(20)]
    assert 5 <= sum(signed) <= 15


def test_a_killed_master_leaves_no_descriptor() -> None:
    with nothing_left():
        for seed in range(3):
            run_seed(seed)


def test_a_failure_names_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Promises, "on_worker", lambda *_: 1 / 0)
    with pytest.raises(Failure, match=r"seed 7: ZeroDivisionError(.|\n)*--start 7 --seeds 1 --trace"):
        run_seed(7)


@pytest.mark.thorough  # a test of the simulation itself
def test_some_days_have_every_kind_of_event() -> None:
    trace: list[str] = []
    for seed in range(30):
        run_seed(seed, trace.append)
    for event in (
        "refuses=True", "hangs=True", "breaks=True", "slow=True", "full=True", "checker unavailable: True",
        "worker 0 crashes", "worker 1 hangs", "the master crashes", ": flip", ": cut", ": remove", ": empty",
        "table: mass delete", "table: mass poison", "table: empty", "table: grow", "table: return", "accept ", "pin ",
        "unpin", "pinned", "an operator acts beside a cycle", "another digit",
    ):  # fmt: skip
        assert any(event in line for line in trace), event


# -- injected bugs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: a line of a module, and its replacement."""

    module: str
    line: str
    """A regular expression for the line without its indentation."""
    instead: str
    broken: str
    """The text of the failure: the promise that is broken."""


PLANE = "control_plane/"
MUTANTS = {
    "a stored catalogue is served unverified": Mutant(
        "catalog/snapshot.py",
        r"if hashlib\.sha256\(self\._buffer\[:-FOOTER_SIZE\]\)\.digest\(\) != self\.footer\.content_digest:",
        "if False:",
        "is not what passed|another content",
    ),
    "bad code is served": Mutant(
        "catalog/gate.py",
        r"return Unserved\.CODE_INVALID if flaws & Flaw\.CODE else None",
        "return None",
        "code that clients refuse",
    ),
    "the served catalogue changes without a lock": Mutant(
        PLANE + "served_catalogue.py", r"async with self\._lock:", "if True:", "no new one|without a pin|passed without"
    ),
    "the guard is not asked": Mutant(
        PLANE + "served_catalogue.py",
        r"if judgement is not None:",
        "if False:",
        "passed without|empty catalogue|octets",
    ),
    "a change is not noticed": Mutant(
        PLANE + "table_reader.py",
        r"if reading\.fingerprint == self\._fingerprint and not due:",
        "if self._fingerprint is not None and not unconditional:",
        "not served as it is|does not have|never good",
    ),
    "workers learn of a publication by the tick alone": Mutant(
        PLANE + "supervisor.py", r"publisher\.on_publish\(self\._on_publish\)", "pass", "is pinned, and a worker serves"
    ),
    "the end of a pin is not noticed": Mutant(
        PLANE + "pinned_catalogue.py",
        r"self\._expiring = asyncio\.get_running_loop\(\)\.create_task\(self\._expire\(\)\)",
        "self._expiring = None",
        "has ended, and a worker serves it",
    ),
    "a pinned catalogue keeps its generation": Mutant(
        PLANE + "served_catalogue.py",
        r"generation = target\.generation if served is None else max\(.*",
        "generation = target.generation",
        "no new one|goes back",
    ),
}


def mutated_package(folder: Path, mutant: Mutant) -> int:
    """A copy of the package with the bug in it, in ``folder``. Returns how many lines were replaced."""
    shutil.copytree(
        ROOT / "service/definition_server", folder / "definition_server", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = folder / "definition_server" / mutant.module
    source, count = re.subn(
        rf"^(\s*){mutant.line}$", lambda found: found[1] + mutant.instead, path.read_text(), flags=re.MULTILINE
    )
    path.write_text(source)
    return count


@pytest.mark.thorough
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MUTANTS)
def test_an_injected_bug_breaks_its_promise(tmp_path: Path, name: str) -> None:
    mutant = MUTANTS[name]
    assert mutated_package(tmp_path, mutant), "the line is no longer there: write the bug into the code as it is now"
    # Any successive days include some that reach these states by construction. Another promise may break first.
    command = [sys.executable, "-m", "tests.simulation.publication", "--seeds", "20", "--keep-going"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1, f"20 days passed: {done.stdout}{done.stderr}"
    assert re.search(rf"^seed \d+: (.|\n)*({mutant.broken})", done.stdout, re.MULTILINE), done.stdout + done.stderr
