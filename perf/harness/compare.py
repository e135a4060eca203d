"""Compares a candidate with its base in pairs: the working tree with another revision, which runs in a git worktree.

Each is one worker on the same CPU. The generator of the working tree measures them alternately. The base uses the
installed dependencies, because only this project's code is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from perf.generator.scenarios import Scenario, ScenarioError
from perf.harness import sla
from perf.harness.run import Effort, Plan
from perf.harness.servers import Servers, Starter
from perf.targets.target import ROOT, START_SECONDS, Target, TargetFailed

CANDIDATE = "native"
PACKAGE = Path("service")
_STOP_SECONDS = 15.0


class NoRevision(Exception):
    """The revision does not exist, or cannot be checked out."""


def revision(name: str) -> str:
    """The commit that ``name`` refers to.

    Raises:
        NoRevision: if there is no such commit.
    """
    run = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if run.returncode:
        raise NoRevision(f"{name!r} is not a revision of this repository; `git log --oneline` lists them")
    return run.stdout.strip()


@contextmanager
def worktree(name: str) -> Iterator[Path]:
    """The revision ``name``, checked out in a temporary directory until the block ends.

    Raises:
        NoRevision: if the revision does not exist, or does not contain this package.
    """
    commit = revision(name)
    with tempfile.TemporaryDirectory(prefix="definition-server-base-") as temporary:
        folder = Path(temporary) / "tree"
        run = _git("worktree", "add", "--detach", "--quiet", str(folder), commit)
        if run.returncode:
            raise NoRevision(f"git cannot check out {name!r}: {run.stderr.strip()}")
        try:
            if not (folder / PACKAGE / "definition_server").is_dir():
                raise NoRevision(f"{name!r} has no {PACKAGE}/definition_server to compare with")
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60, check=False)


def starters(folder: Path) -> dict[str, Starter]:
    """Name → function that starts the base, whose code is in ``folder``, or the candidate, the working tree.

    Both start in the same way, because a worker that shares the catalogue's memory with the generator is some per cent
    faster than one with its own copy.
    """
    return {sla.BASE: _starter(sla.BASE, folder), CANDIDATE: _starter(CANDIDATE, ROOT)}


def _starter(name: str, folder: Path) -> Starter:

    @contextmanager
    def start(servers: Servers) -> Iterator[Target]:
        catalogue = servers.catalogue
        wanted = [str(catalogue.count), str(catalogue.answer_octets), "native"]
        if servers.tls:
            wanted += [servers.tls["tls_cert_file"], servers.tls["tls_key_file"]]
        path = os.pathsep.join([str(folder / PACKAGE), str(ROOT)])
        process = subprocess.Popen(
            [sys.executable, "-m", "perf.harness.serve", *wanted],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            yield _started(name, process, folder)
        finally:
            _end(process)

    return start


def _started(name: str, process: subprocess.Popen[str], folder: Path) -> Target:
    """The worker that the process reports. The process ends if that takes longer than `START_SECONDS`."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        process.wait(START_SECONDS)
        errors = process.stderr.read()[-1000:] if process.stderr else ""
        raise TargetFailed(f"{name} does not start: {errors}")
    report = json.loads(line)
    if "error" in report:
        raise TargetFailed(f"this harness cannot start {name}; its code may differ too much: {report['error']}")
    if not Path(report["code"]).is_relative_to(folder):
        raise TargetFailed(f"{name} would run the code in {report['code']}, not in {folder}")
    return Target(name, report["port"], report["pid"])


def _end(process: subprocess.Popen[str]) -> None:
    """Close the standard input of the process, which then ends its worker and itself."""
    try:
        process.communicate("", timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def plans(
    scenarios: Mapping[str, Scenario],
    gates: Sequence[sla.Gate],
    candidates: Mapping[str, Sequence[str]],
    effort: Effort,
) -> list[Plan]:
    """The plans whose runs ``gates`` judge, each together with a server that is called `sla.BASE`.

    Args:
        candidates: Scenario → the servers judged in it; a scenario without a server is not measured.

    Raises:
        ScenarioError: if no gate judges any of the ``candidates``.
    """
    found = []
    for name in dict.fromkeys(gate.scenario for gate in gates):
        if servers := candidates.get(name):
            judged = tuple(gate.of(each) for gate in gates if gate.scenario == name for each in servers)
            found.append(effort.plan(scenarios[name], (sla.BASE, *servers), judged))
    if not found:
        judged_ones = ", ".join(dict.fromkeys(gate.scenario for gate in gates))
        raise ScenarioError(
            f"a comparison judges only {judged_ones}; none of them was chosen, but {', '.join(candidates)}"
        )
    return found
