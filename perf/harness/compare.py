"""A candidate beside its base, pairwise: the working tree and another revision of it, which runs from a git worktree.

Both are one worker on the same CPU, measured in turns by the same generator of today. The base's dependencies are those
that are installed: the comparison is about this project's code.
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

from perf.generator.scenarios import Scenario
from perf.harness import sla
from perf.harness.run import Effort, Plan
from perf.harness.servers import Servers, Starter
from perf.targets.target import ROOT, START_SECONDS, Target, TargetFailed

CANDIDATE = "native"
PACKAGE = Path("service")
_STOP_SECONDS = 15.0


class NoRevision(Exception):
    """There is no such revision, or it cannot be checked out."""


def revision(name: str) -> str:
    """The commit that ``name`` stands for.

    Raises:
        NoRevision: where there is none.
    """
    told = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if told.returncode:
        raise NoRevision(f"{name!r} is no revision of this repository; `git log --oneline` lists them")
    return told.stdout.strip()


@contextmanager
def worktree(name: str) -> Iterator[Path]:
    """The revision ``name``, checked out in a directory of its own for as long as the block lasts.

    Raises:
        NoRevision: where there is none, or none of this package in it.
    """
    commit = revision(name)
    with tempfile.TemporaryDirectory(prefix="definition-server-base-") as temporary:
        folder = Path(temporary) / "tree"
        told = _git("worktree", "add", "--detach", "--quiet", str(folder), commit)
        if told.returncode:
            raise NoRevision(f"git cannot check {name!r} out: {told.stderr.strip()}")
        try:
            if not (folder / PACKAGE / "definition_server").is_dir():
                raise NoRevision(f"{name!r} has no {PACKAGE}/definition_server: nothing to compare with")
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60, check=False)


def starters(folder: Path) -> dict[str, Starter]:
    """Name → how to start the base, which lies in ``folder``, and the candidate, which is the working tree.

    Both in the same way: a worker whose catalogue lies in the memory that the generator compares with is some per cent
    faster than one with a copy of its own.
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
            yield _told(name, process, folder)
        finally:
            _end(process)

    return start


def _told(name: str, process: subprocess.Popen[str], folder: Path) -> Target:
    """What the process says of its worker. It ends by itself where that takes longer than `START_SECONDS`."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        process.wait(START_SECONDS)
        errors = process.stderr.read()[-1000:] if process.stderr else ""
        raise TargetFailed(f"{name} does not start: {errors}")
    told = json.loads(line)
    if "error" in told:
        raise TargetFailed(f"this harness cannot start {name}; is it too different? {told['error']}")
    if not Path(told["code"]).is_relative_to(folder):
        raise TargetFailed(f"{name} would run the code in {told['code']}, not in {folder}")
    return Target(name, told["port"], told["pid"])


def _end(process: subprocess.Popen[str]) -> None:
    """Close its standard input; it then ends its worker and itself."""
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
    """What has to be measured to judge by ``gates``, all beside a server that is called `sla.BASE`.

    Args:
        candidates: scenario → the servers that are judged in it; a scenario without any is not measured.
    """
    found = []
    for name in dict.fromkeys(gate.scenario for gate in gates):
        if servers := candidates.get(name):
            judged = tuple(gate.of(each) for gate in gates if gate.scenario == name for each in servers)
            found.append(effort.plan(scenarios[name], (sla.BASE, *servers), judged))
    return found
