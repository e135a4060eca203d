"""Real workers for measurements: their start, failures and end."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from perf.harness import compare, selftest, sla
from perf.harness.compare import NoRevision
from perf.harness.servers import Servers
from perf.targets.catalogue import Catalogue
from perf.targets.processes import is_alive
from perf.targets.target import ROOT, CannotListen, TargetFailed, worker
from tests.support.leftovers import open_descriptors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def catalogue() -> Iterator[Catalogue]:
    """A small one."""
    made = Catalogue(2, 400)
    yield made
    made.close()


def listens(port: int) -> bool:
    """Whether a process accepts connections on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.thorough  # ten workers
def test_every_worker_of_the_self_test_starts_and_none_is_left(catalogue: Catalogue) -> None:
    with Servers(catalogue, others=selftest.starters()) as servers:
        targets = [servers.target(name) for name in selftest.starters()]
        assert all(listens(target.port) for target in targets)
        assert servers.target(sla.BASE) is targets[0], "the running server is used again"
        servers.stop(sla.BASE)
        assert not is_alive(targets[0].pid)
        targets.append(servers.target(sla.BASE))
        assert targets[-1].pid != targets[0].pid
    assert not any(is_alive(target.pid) for target in targets)


def test_a_port_in_use_is_reported(catalogue: Catalogue) -> None:
    threads = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=str(port)), worker(
            "native", catalogue.descriptor, catalogue.built, port=port
        ):  # fmt: skip
            pass
    assert threading.active_count() == threads


def test_a_worker_that_dies_at_its_start_is_reported_with_its_output(catalogue: Catalogue) -> None:
    program = (sys.executable, "-c", "print('no luck today'); raise SystemExit(7)")
    failing = worker("native", catalogue.descriptor, catalogue.built, program=program)
    with pytest.raises(TargetFailed, match="ended with 7: no luck today"), failing:
        pass


def test_candidate_and_base_of_a_comparison_are_started_alike_and_none_is_left(catalogue: Catalogue) -> None:
    starters = compare.starters(ROOT)
    with Servers(catalogue, others=starters) as servers:
        found = [servers.target(name) for name in (sla.BASE, compare.CANDIDATE)]
        assert [target.name for target in found] == [sla.BASE, compare.CANDIDATE]
        assert all(listens(target.port) for target in found)
    assert not any(is_alive(target.pid) for target in found)


def test_a_base_that_cannot_be_started_is_reported_in_one_line(catalogue: Catalogue, tmp_path: Path) -> None:
    package = tmp_path / compare.PACKAGE / "definition_server"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with Servers(catalogue, others=compare.starters(tmp_path)) as servers:
        with pytest.raises(TargetFailed, match=r"cannot start base; .* differ too much: ModuleNotFoundError"):
            servers.target(sla.BASE)
        with pytest.raises(TargetFailed, match="differ too much"):
            servers.target(sla.BASE)


def test_a_worktree_exists_only_within_its_block() -> None:
    def trees() -> str:
        return subprocess.run(["git", "-C", str(ROOT), "worktree", "list"], capture_output=True, text=True).stdout

    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    with compare.worktree("HEAD") as folder:
        assert (folder / compare.PACKAGE / "definition_server" / "__init__.py").exists()
        assert str(folder) in trees()
    assert not folder.exists()
    assert str(folder) not in trees()


def test_an_unknown_revision_is_reported() -> None:
    with pytest.raises(NoRevision, match="'no-such-thing' is not a revision"), compare.worktree("no-such-thing"):
        pass


def test_only_our_workers_publish_and_all_descriptors_are_closed(catalogue: Catalogue) -> None:
    with Servers(catalogue) as servers:
        target = servers.target("native")
        descriptors = len(open_descriptors())
        for _ in range(2):
            with servers.publications("native", 2) as publish:
                publish()
                publish()
                with pytest.raises(StopIteration):
                    publish()
        assert len(open_descriptors()) == descriptors
        assert listens(target.port)
        named = replace(target, name="native")
        assert named == servers.target("native")
    others = Servers(catalogue, others=selftest.starters())
    refused = pytest.raises(TargetFailed, match="cannot publish")
    with others, refused, others.publications(selftest.CLEAN, 1):
        pass
