"""``python -m tests.mutants``: draw faults, run the tests on each, print which survived and the share by room."""

from __future__ import annotations

import argparse
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tests.mutants.rooms import ROOMS, Room
from tests.mutants.sampling import Mutant, mutated, sample

ROOT = Path(__file__).parents[2]
LEAST_SHARE = 0.92
KILLED, SURVIVED, TIMED_OUT = "killed", "SURVIVED", "timed out"
ROUND_SECONDS = 600


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="nox -s mutants --", description=__doc__)
    made.add_argument("--sample", type=int, default=200, metavar="N", help="how many faults, shared among the rooms")
    made.add_argument("--seed", type=int, default=int(time.time()), metavar="S", help="the same seed, the same faults")
    made.add_argument("--room", action="append", choices=[room.name for room in ROOMS], help="only this one")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="faults tried at once")
    made.add_argument("--list", action="store_true", help="show the faults, run no test")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    return made


def copy_of_the_project(folder: Path) -> Path:
    """The files that git tracks, as they are in the working tree, below ``folder``."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def verdict(mutant: Mutant, room: Room, tree: Path) -> dict[str, Any]:
    """Run the tests of ``room`` on ``tree`` with the fault in it."""
    path = tree / mutant.module
    source = path.read_text("utf-8")
    changed = mutated(mutant, source)
    diff = "\n".join(line for line in difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm="")
                     if line[:1] in "+-" and line[:3] not in ("+++", "---"))  # fmt: skip
    path.write_text(changed, "utf-8")
    began = time.monotonic()
    try:
        result = SURVIVED
        for tests in room.tests(mutant.module, tree):
            result = run(tests, tree)
            if result != SURVIVED:
                break
    finally:
        path.write_text(source, "utf-8")
    return {"room": room.name, "mutant": str(mutant), "kind": mutant.kind, "diff": diff, "result": result,
            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


def run(tests: list[str], tree: Path) -> str:
    """Run ``tests`` on ``tree``. A fault that makes them hang is noticed, too."""
    present = [each for each in tests if (tree / each).exists()]
    environment = os.environ | {"PYTHONPATH": str(tree / "service"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout=90", *present]
    with subprocess.Popen(command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, start_new_session=True) as process:  # fmt: skip
        try:
            code = process.wait(ROUND_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return TIMED_OUT if code is None else SURVIVED if code in (0, 5) else KILLED


class NoVerdict(Exception):
    """Tests fail without a fault, so they would seem to notice every one."""


def check_without_fault(drawn: dict[str, list[Mutant]], tree: Path) -> None:
    """Raise `NoVerdict` where the first tests that would be run for a room do not pass on the unchanged ``tree``."""
    rooms = {room.name: room for room in ROOMS}
    for name, mutants in drawn.items():
        tests = next(iter(rooms[name].tests(mutants[0].module, tree)), []) if mutants else []
        if tests and run(tests, tree) != SURVIVED:
            raise NoVerdict(f"{name}: the tests fail without any fault: {' '.join(tests)}")


def judge(drawn: dict[str, list[Mutant]], jobs: int, console: Console) -> list[dict[str, Any]]:
    """The verdicts on all mutants, ``jobs`` at once, each in a copy of its own."""
    rooms = {room.name: room for room in ROOMS}
    results: list[dict[str, Any]] = []
    saying = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            trees.put(copy_of_the_project(Path(folder) / str(number)))
        check_without_fault(drawn, trees.queue[0])

        def one(name: str, mutant: Mutant) -> None:
            tree = trees.get()
            try:
                result = verdict(mutant, rooms[name], tree)
            finally:
                trees.put(tree)
            with saying:
                results.append(result)
                console.print(
                    f"{len(results):4} {result['result']:9} {result['seconds']:6.1f} s {mutant}", highlight=False
                )
                if result["result"] == SURVIVED:
                    console.print(result["diff"], markup=False, highlight=False)

        with ThreadPoolExecutor(jobs) as pool:
            for future in [pool.submit(one, name, mutant) for name, each in drawn.items() for mutant in each]:
                future.result()
    return results


def table(results: list[dict[str, Any]]) -> Table:
    """How many were noticed, by room and kind."""
    made = Table("room", "faults", "noticed", "share", "survivors by kind")
    for room in ROOMS:
        mine = [result for result in results if result["room"] == room.name]
        if mine:
            left = [result["kind"] for result in mine if result["result"] == SURVIVED]
            kinds = ", ".join(f"{left.count(kind)} {kind}" for kind in sorted(set(left)))
            made.add_row(
                room.name, str(len(mine)), str(len(mine) - len(left)), f"{1 - len(left) / len(mine):.1%}", kinds
            )
    return made


def main() -> int:
    """Returns 0 where every room notices at least `LEAST_SHARE` of its faults, 2 where its tests fail without one."""
    arguments = parser().parse_args()
    rooms = tuple(room for room in ROOMS if not arguments.room or room.name in arguments.room)
    drawn = sample(rooms, ROOT, arguments.sample, arguments.seed)
    console = Console(soft_wrap=True)
    if arguments.list:
        for each in drawn.values():
            for mutant in each:
                console.print(str(mutant), markup=False, highlight=False)
        return 0
    console.print(f"seed {arguments.seed}, {sum(map(len, drawn.values()))} faults")
    try:
        results = judge(drawn, arguments.jobs, console)
    except NoVerdict as error:
        console.print(str(error), markup=False, highlight=False)
        return 2
    console.print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "results": results}, indent=1), "utf-8")
    shares = []
    for name in drawn:
        mine = [result for result in results if result["room"] == name]
        shares.append(sum(result["result"] != SURVIVED for result in mine) / max(1, len(mine)))
    return 0 if all(share >= LEAST_SHARE for share in shares) else 1


if __name__ == "__main__":
    sys.exit(main())
