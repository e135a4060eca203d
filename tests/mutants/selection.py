"""The tests that run a line: measured once by coverage, so that a fault costs only the tests that can notice it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coverage
from tests.mutants.rooms import limits_of, mirror
from tests.mutants.sampling import Mutant

SECONDS_A_FAULT = 100.0
"""The most that the tests of one fault may take together. The slowest are left out; a fault that only they notice is a
survivor.
"""
SECONDS_OF_FIRST_ROUND = 8.0

_SETTINGS = """\
[run]
source = {tree}/service/definition_server, {tree}/service/grpc_h2
omit = */rpc/*_pb2*
data_file = {tree}/.coverage
parallel = true
patch = subprocess
sigterm = true
concurrency = thread
"""


@dataclass
class KnownTests:
    """The results of the tests of some files."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Id of a test that passes on the unchanged code -> how long it takes."""
    failing: dict[str, str] = field(default_factory=dict)
    """Id of a test that fails on the unchanged code, and so can show nothing -> its error."""
    names: list[str] = field(default_factory=list)
    lines: dict[str, dict[int, int]] = field(default_factory=dict)
    """Module (relative to the root) -> line -> the tests that run it: bit n stands for the n-th name of ``names``."""
    digests: dict[str, str] = field(default_factory=dict)
    """Test file -> its digest; under the name "service" the one of the code."""

    @classmethod
    def read(cls, path: Path) -> KnownTests:
        """The content of the file that `write` has made; empty if there is no such file."""
        if not path.exists():
            return cls()
        stored = json.loads(path.read_text("utf-8"))
        stored["lines"] = {
            module: {int(line): int(tests, 16) for line, tests in lines.items()}
            for module, lines in stored["lines"].items()
        }
        return cls(**stored)

    def write(self, path: Path) -> None:
        """Store everything as JSON."""
        lines = {module: {line: hex(tests) for line, tests in lines.items()} for module, lines in self.lines.items()}
        path.write_text(json.dumps(vars(self) | {"lines": lines}), "utf-8")

    def that_run(self, module: str, numbers: Iterable[int] | None = None) -> set[str]:
        """The tests that run one of these lines, or any line of the module, and pass on the unchanged code."""
        lines = self.lines.get(module, {})
        bits = 0
        for number in lines if numbers is None else numbers:
            bits |= lines.get(number, 0)
        return {name for place, name in enumerate(self.names) if bits >> place & 1} & self.seconds.keys()

    def forget(self, file: str) -> None:
        """Drop the results of the tests in ``file``."""
        for known in (self.seconds, self.failing):
            for name in [name for name in known if name.startswith(f"{file}::")]:
                del known[name]
        kept = ~sum(1 << place for place, name in enumerate(self.names) if name.startswith(f"{file}::"))
        for lines in self.lines.values():
            for number in lines:
                lines[number] &= kept
        self.digests.pop(file, None)

    def of(self, mutant: Mutant, most_seconds: float = SECONDS_A_FAULT) -> list[list[str]]:
        """The tests that run the statement with the fault, in two rounds: first quick tests, then the others.

        A statement that runs at the import of its module (a constant, a default) is judged by all tests of the module,
        by the tests in its own test file, and by the tests that state the limits of its folder, because a test that
        states a constant may run no line of a module that is already imported.
        """
        names = self.that_run(str(mutant.module), mutant.statement if mutant.in_function else None)
        if not mutant.in_function:
            stating = (f"{limits_of(mutant.module)}::", f"{mirror(mutant.module)}.py::")
            names |= {name for name in self.seconds if name.startswith(stating)}
        # If several tests of a file share a server, its lines are noted only for the first of these tests.
        files = {name.partition("::")[0] for name in names if name.startswith("tests/integration")}
        names |= {name for name in self.seconds.keys() - set(self.names) if name.partition("::")[0] in files}
        own = mirror(mutant.module)

        def cost(name: str) -> tuple[int, bool, str, str]:
            seconds = self.seconds[name]
            step = sum(seconds >= limit for limit in (0.03, 0.5, 2.0))
            return max(0, step - name.startswith(own)), not name.startswith(own), name.partition("::")[0], name

        rounds: list[list[str]] = [[], []]
        spent = 0.0
        for name in sorted(names, key=cost):
            spent += self.seconds[name]
            if spent <= most_seconds:
                rounds[spent > SECONDS_OF_FIRST_ROUND].append(name)
        return [each for each in rounds if each]


def changed(known: KnownTests, tree: Path, tests: Iterable[str]) -> dict[str, list[str]]:
    """Folder → its test files whose state in ``tree`` `measure` has not seen. If the code has changed, these are all
    files."""
    code = _digest(*sorted((tree / "service").rglob("*.py")))
    if known.digests.get("service") != code:
        known.__init__()
        known.digests["service"] = code
    found: dict[str, list[str]] = {}
    for path in sorted({path for each in tests for path in (tree / each).rglob("test_*.py")}):
        name = str(path.relative_to(tree))
        if known.digests.get(name) != _digest(path):
            found.setdefault(str(Path(name).parent), []).append(name)
    return found


def measure(known: KnownTests, tree: Path, files: list[str], jobs: int) -> None:
    """Run test files on the unchanged ``tree``, and note which test runs which line."""
    for file in files:
        known.forget(file)
    _measure(known, tree, files, jobs)
    known.digests |= {file: _digest(tree / file) for file in files}


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def _measure(known: KnownTests, tree: Path, files: list[str], jobs: int) -> None:
    (tree / "coverage-of-tests.ini").write_text(_SETTINGS.format(tree=tree), "utf-8")
    settings = f"--rcfile={tree / 'coverage-of-tests.ini'}"
    outcomes = tree / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    side_by_side = ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    command = [sys.executable, "-m", "coverage", "run", settings, "-m", "pytest", "-q", "-m", "not quiet",
               "-p", "tests.mutants.plugin", f"--outcomes={outcomes}", "--one-transport=alternate", "--timeout=180",
               *side_by_side, *files]  # fmt: skip
    ran = subprocess.run(command, cwd=tree, env=environment(tree), stdin=subprocess.DEVNULL, capture_output=True,
                         text=True, check=False)  # fmt: skip
    if not outcomes.exists():
        raise RuntimeError(f"pytest ran no test of {files}:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    subprocess.run([sys.executable, "-m", "coverage", "combine", "-q", settings],
                   cwd=tree, env=environment(tree), check=False)  # fmt: skip
    for name, (outcome, seconds, error) in json.loads(outcomes.read_text("utf-8")).items():
        if outcome == "failed":
            known.failing[name] = error
        elif outcome == "passed":
            known.seconds[name] = seconds
    stored = tree / ".coverage"
    data = coverage.CoverageData(str(stored))
    data.read()
    places = {name: place for place, name in enumerate(known.names)}
    for path in data.measured_files():
        lines = known.lines.setdefault(str(Path(path).relative_to(tree)), {})
        for number, contexts in data.contexts_by_lineno(path).items():
            for name in filter(None, contexts):
                if name not in places:
                    places[name] = len(known.names)
                    known.names.append(name)
                lines[number] = lines.get(number, 0) | 1 << places[name]
    data.close()
    stored.unlink()


def environment(tree: Path) -> dict[str, Any]:
    """The environment of tests on ``tree``."""
    return os.environ | {"PYTHONPATH": str(tree / "service")}
