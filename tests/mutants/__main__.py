"""``python -m tests.mutants``: draw faults, run the tests on each, print which survived and the share by room."""

from __future__ import annotations

import argparse
import compileall
import difflib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tests.mutants.rooms import ROOMS
from tests.mutants.sampling import Mutant, mutated, sample
from tests.mutants.selection import SECONDS_A_FAULT, KnownTests, changed, environment, measure

ROOT = Path(__file__).parents[2]
LEAST_SHARE = 0.92
KILLED, SURVIVED, UNREACHED = "killed", "SURVIVED", "NOT RUN"
ROUND_SECONDS = 600
QUICK_SECONDS = 0.5
"""A test that takes longer may fail because the machine is busy: it must fail again on the same fault, alone."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="nox -s mutants --", description=__doc__)
    made.add_argument("--sample", type=int, default=200, metavar="N", help="how many faults, shared among the rooms")
    made.add_argument("--seed", type=int, default=int(time.time()), metavar="S", help="the same seed, the same faults")
    made.add_argument("--room", action="append", choices=[room.name for room in ROOMS], help="only this one")
    made.add_argument("--only", action="append", metavar="TEXT", help="only faults whose description contains TEXT")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="faults tried at once")
    made.add_argument("--list", action="store_true", help="show the faults, run no test")
    made.add_argument("--known", type=Path, metavar="FILE",
                      help="store which test runs which line; only changed test files are measured again")  # fmt: skip
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="store the results; faults with a stored result are not tried again"
    )
    made.add_argument("--seconds", type=float, default=SECONDS_A_FAULT, metavar="S",
                      help="of tests for one fault; the slowest are left out (default: %(default)g)")  # fmt: skip
    made.add_argument("--minutes", type=float, default=1e9, metavar="M", help="stop after M; --json continues later")
    return made


def copy_of_the_project(folder: Path) -> Path:
    """The files that git tracks, as they are in the working tree, below ``folder``."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    compileall.compile_dir(folder / "service", quiet=2)
    return folder


def verdict(mutant: Mutant, known: KnownTests, runner: Runner, seconds: float = SECONDS_A_FAULT) -> dict[str, Any]:
    """Run the tests that run the line of ``mutant``, with the fault in it."""
    source = (runner.tree / mutant.module).read_text("utf-8")
    changed = mutated(mutant, source)
    diff = "\n".join(line for line in difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm="")
                     if line[:1] in "+-" and line[:3] not in ("+++", "---"))  # fmt: skip
    rounds = known.of(mutant, seconds)
    began = time.monotonic()
    result, witness = SURVIVED if rounds else UNREACHED, ""
    with runner.changed(mutant.module, changed):
        for tests in rounds:
            witness = run(tests, known, runner)
            if witness:
                result = KILLED
                break
    return {"mutant": str(mutant), "kind": mutant.kind, "diff": diff, "result": result, "by": witness,
            "tests": sum(map(len, rounds)), "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


def run(tests: list[str], known: KnownTests, runner: Runner) -> str:
    """The first of ``tests`` that fails, or another sign of the fault; empty if there is none.

    A failure that a busy machine may have caused is accepted only if the test fails again, alone.
    """
    left = list(tests)
    while left:
        outcomes = runner.pytest(left)
        if outcomes is None:
            return "pytest did not end"
        failed = next((name for name, outcome in outcomes.items() if outcome[0] == "failed"), None)
        if failed is None:
            # No test was collected, because the module cannot be imported.
            return "" if outcomes else "nothing was run"
        slow = max(known.seconds.get(failed, 0), outcomes[failed][1]) >= QUICK_SECONDS
        if not slow or (again := runner.pytest([failed])) is None or again.get(failed, ["failed"])[0] == "failed":
            return failed
        left = [name for name in left if name not in outcomes]
    return ""


class Runner:
    """A copy of the project, and a process that runs tests on it (`zygote`)."""

    def __init__(self, folder: Path) -> None:
        self.tree = copy_of_the_project(folder)
        self._changes = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.zygote"], cwd=self.tree, env=environment(self.tree), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    @contextmanager
    def changed(self, module: Path | str, source: str) -> Iterator[None]:
        """A context in which ``module`` (a path relative to the tree) has another source."""
        path = self.tree / module
        original, at = path.read_text("utf-8"), path.stat().st_mtime
        path.write_text(source, "utf-8")
        # Python compares time and size of a source with those of its cached module: each change gets another time.
        self._changes += 1
        os.utime(path, (at + 10 * self._changes,) * 2)
        try:
            yield
        finally:
            path.write_text(original, "utf-8")
            os.utime(path, (at, at))

    def pytest(self, tests: list[str]) -> dict[str, list[Any]] | None:
        """Test -> outcome, seconds, error; up to the first failure. None if pytest does not end or is killed."""
        selection, outcomes = self.tree / "selection.json", self.tree / "outcomes.json"
        selection.write_text(json.dumps(tests), "utf-8")
        outcomes.unlink(missing_ok=True)
        files = dict.fromkeys(name.partition("::")[0] for name in tests)
        arguments = ["-x", "-q", "-p", "tests.mutants.plugin", f"--selection={selection}", f"--outcomes={outcomes}",
                     "--one-transport=alternate", "--timeout=90",
                     "-W", "ignore::pytest.PytestAssertRewriteWarning",  # hypothesis is imported already
                     *files]  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        group = int(self._process.stdout.readline())
        end = threading.Timer(ROUND_SECONDS, os.killpg, (group, signal.SIGKILL))
        end.start()
        try:
            self._process.stdout.readline()
        finally:
            end.cancel()
        if outcomes.exists():
            return dict(json.loads(outcomes.read_text("utf-8")))
        _end_servers(self.tree)
        return None


def _end_servers(tree: Path) -> None:
    """End the servers that the tests on ``tree`` started, in groups of their own, and left behind."""
    mark = f"PYTHONPATH={environment(tree)['PYTHONPATH']}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def judge(drawn: dict[str, list[Mutant]], arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """The verdicts on all mutants, ``--jobs`` at once, each in a copy of its own."""
    results: list[dict[str, Any]] = []
    if arguments.json and arguments.json.exists():
        stored = json.loads(arguments.json.read_text("utf-8"))
        results = stored["results"] if stored["seed"] == arguments.seed else []
    done = {result["mutant"] for result in results}
    end = time.monotonic() + arguments.minutes * 60
    saying = threading.Lock()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        runners: queue.Queue[Runner] = queue.Queue()
        for number in range(arguments.jobs):
            runners.put(runner := Runner(folder / str(number)))
            stack.callback(runner.close)
        known = measured(drawn, runners.queue[0].tree, arguments, end, console)

        def one(name: str, mutant: Mutant) -> None:
            if str(mutant) in done or time.monotonic() > end:
                return
            runner = runners.get()
            try:
                result = verdict(mutant, known, runner, arguments.seconds)
            finally:
                runners.put(runner)
            with saying:
                results.append({"room": name} | result)
                console.print(f"{len(results):4} {result['result']:9} {result['seconds']:6.1f} s {mutant}"
                              f" {result['by']}", markup=False, highlight=False)  # fmt: skip
                if result["result"] != KILLED:
                    console.print(f"{result['tests']} tests\n{result['diff']}", markup=False, highlight=False)
                if arguments.json:
                    stored = json.dumps({"seed": arguments.seed, "results": results}, indent=1)
                    arguments.json.write_text(stored, "utf-8")

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for future in [pool.submit(one, name, mutant) for name, each in drawn.items() for mutant in each]:
                future.result()
    return results


def measured(
    rooms: Iterable[str], tree: Path, arguments: argparse.Namespace, end: float, console: Console
) -> KnownTests:
    """Which test runs which line.

    Raises:
        TooLate: the time was too short; the file of ``--known`` has the measurements so far.
    """
    known = KnownTests.read(arguments.known) if arguments.known else KnownTests()
    tests = {each for room in ROOMS if room.name in rooms for each in room.tests}
    for folder, files in changed(known, tree, sorted(tests)).items():
        if time.monotonic() > end:
            raise TooLate
        console.print(f"measuring {len(files)} test files in {folder} on the unchanged code", highlight=False)
        measure(known, tree, files, arguments.jobs)
        if arguments.known:
            known.write(arguments.known)
    for name, error in known.failing.items():
        console.print(f"left out, since it fails without a fault: {name}\n{error}", markup=False, highlight=False)
    return known


class TooLate(Exception):
    """``--minutes`` are over."""


def table(results: list[dict[str, Any]]) -> Table:
    """The number of faults that were noticed, by room and kind."""
    made = Table("room", "faults", "noticed", "share", "survivors by kind")
    for room in ROOMS:
        mine = [result for result in results if result["room"] == room.name]
        if mine:
            left = [result["kind"] for result in mine if result["result"] != KILLED]
            kinds = ", ".join(f"{left.count(kind)} {kind}" for kind in sorted(set(left)))
            made.add_row(
                room.name, str(len(mine)), str(len(mine) - len(left)), f"{1 - len(left) / len(mine):.1%}", kinds
            )
    return made


def main() -> int:
    """Returns 0 if every room notices at least `LEAST_SHARE` of its faults, and 3 if the time was too short."""
    arguments = parser().parse_args()
    rooms = tuple(room for room in ROOMS if not arguments.room or room.name in arguments.room)
    drawn = sample(rooms, ROOT, arguments.sample, arguments.seed)
    if arguments.only:
        drawn = {name: [mutant for mutant in each if any(text in str(mutant) for text in arguments.only)]
                 for name, each in drawn.items()}  # fmt: skip
    console = Console(soft_wrap=True)
    if arguments.list:
        for each in drawn.values():
            for mutant in each:
                console.print(str(mutant), markup=False, highlight=False)
        return 0
    console.print(f"seed {arguments.seed}, {sum(map(len, drawn.values()))} faults")
    try:
        results = judge(drawn, arguments, console)
    except TooLate:
        return 3
    console.print(table(results))
    if len(results) < sum(map(len, drawn.values())):
        return 3
    shares = []
    for name in drawn:
        mine = [result for result in results if result["room"] == name]
        shares.append(sum(result["result"] == KILLED for result in mine) / max(1, len(mine)))
    return 0 if all(share >= LEAST_SHARE for share in shares) else 1


if __name__ == "__main__":
    sys.exit(main())
