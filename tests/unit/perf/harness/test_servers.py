"""Real workers for measurements: their start, failures and end."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from perf.harness import compare, selftest, sla
from perf.harness.compare import NoRevision
from perf.harness.servers import Servers
from perf.peers import PeerMissing, compiled, stacks
from perf.peers.compiled import CompiledEngine
from perf.targets.catalogue import Catalogue
from perf.targets.processes import is_alive
from perf.targets.target import ROOT, CannotListen, TargetFailed, worker
from tests.support.leftovers import open_descriptors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def catalogue() -> Iterator[Catalogue]:
    """A small catalogue."""
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


@pytest.fixture
def compiled_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the build, with our packages, whose engine says that it is compiled."""
    folder = tmp_path / "build"
    copytree(ROOT / "service", folder, ignore=ignore_patterns("__pycache__"))
    front = folder / "grpc_h2" / "__init__.py"
    written, count = re.subn(r"(?m)^ENGINE: Final = .*$", 'ENGINE: Final = "compiled"', front.read_text())
    assert count == 1
    front.write_text(written)
    monkeypatch.setattr(CompiledEngine, "place", folder)
    return folder


def test_the_compiled_form_is_a_worker_that_imports_the_build_and_can_publish(
    catalogue: Catalogue, compiled_form: Path
) -> None:
    with Servers(catalogue) as servers:
        target = servers.target("compiled")
        assert target.name == "compiled"
        assert listens(target.port)
        with servers.publications("compiled", 1) as publish:
            publish()


def test_a_worker_whose_engine_has_the_other_form_is_not_measured(catalogue: Catalogue, compiled_form: Path) -> None:
    front = compiled_form / "grpc_h2" / "__init__.py"
    front.write_text(front.read_text().replace('ENGINE: Final = "compiled"', 'ENGINE: Final = "pure"'))
    told = rf"ended with 1: the engine in {compiled_form}/grpc_h2 is pure, not compiled"
    with Servers(catalogue) as servers, pytest.raises(TargetFailed, match=told):
        servers.target("compiled")


def test_a_compiled_engine_is_not_measured_as_the_pure_one(
    catalogue: Catalogue, compiled_form: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(compiled_form))
    with Servers(catalogue) as servers, pytest.raises(TargetFailed, match="is compiled, not pure"):
        servers.target("native")


def test_a_compiled_form_that_is_not_built_is_missing_in_one_line(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "CACHE", tmp_path)
    monkeypatch.setattr(CompiledEngine, "missing_tools", "")
    told = "^compiled cannot be started: not built from these sources: run `python -m perf peers build compiled`$"
    with Servers(catalogue) as servers, pytest.raises(PeerMissing, match=told):
        servers.target("compiled")


def test_a_build_belongs_to_the_sources_and_to_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "service" / "__pycache__").mkdir(parents=True)
    (tmp_path / "service" / "a.py").write_text("1")
    (tmp_path / "hatch_build.py").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    build = CompiledEngine("compiled")
    first = build.place
    assert sys.implementation.cache_tag in str(first)
    (tmp_path / "service" / "__pycache__" / "a.pyc").write_text("cached")
    assert build.place == first
    for name in ("service/a.py", "hatch_build.py", "pyproject.toml"):
        before = build.place
        (tmp_path / name).write_text("changed")
        assert build.place != before, name


def test_candidate_and_base_of_a_comparison_are_started_in_the_same_way_and_none_is_left(catalogue: Catalogue) -> None:
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
