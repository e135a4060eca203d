"""The environment of nox's sessions: it is installed once and again when necessary, and never replaces another
directory."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
from tests import conftest
from tests.support.families import sample

ROOT = Path(__file__).parents[2]


class CommandFailed(Exception):
    """A stand-in for ``nox.command.CommandFailed``."""

    def __init__(self, return_code: int | None = None) -> None:
        super().__init__()
        self.return_code = return_code


class SessionFailed(Exception):
    """`Session.error` was called."""


class Session:
    """A session that notes its commands. The command ``venv`` makes the files for which noxfile.py looks."""

    name = "a session"

    def __init__(self, fails: Callable[[list[str]], bool] = lambda command: False) -> None:
        self.env: dict[str, str | None] = {}
        self.posargs: list[str] = []
        self.installing: list[list[str]] = []
        self.running: list[list[str]] = []
        self._fails = fails

    def run_install(self, *command: str, **_: Any) -> None:
        self.installing.append(list(command))
        if self._fails(list(command)):
            raise CommandFailed
        if "venv" in command:
            folder = Path(command[-1])
            (folder / "bin").mkdir(parents=True)
            (folder / "pyvenv.cfg").touch()
            (folder / "bin/python").symlink_to(sys.executable)
            (folder / "bin/pip").touch()

    def run(self, *command: str, **_: Any) -> None:
        """A session as under ``nox --install-only``, which runs no command."""
        self.running.append(list(command))

    def log(self, *_: str) -> None: ...

    def error(self, text: str) -> NoReturn:
        raise SessionFailed(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose path has a blank; the working directory."""
    project = tmp_path / "a project"
    project.mkdir()
    for name in ("pyproject.toml", "constraints.txt", "noxfile.py"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(project)
    for name in ("NOX_ENVIRONMENT", "UNIT_COVERAGE", "CI_BESIDE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", os.devnull)  # no uv
    return project


@pytest.fixture
def noxfile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The project's noxfile.py, on a stand-in for nox, which the README's test command does not install."""
    nox, command = ModuleType("nox"), ModuleType("nox.command")
    for module, names in (
        (command, {"CommandFailed": CommandFailed}),
        (nox, {"options": SimpleNamespace(), "Session": Session, "session": _session, "command": command}),
    ):
        for name, value in names.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = spec_from_file_location("noxfile_of_a_test", folder / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_install_by_uv", lambda *_: False)
    return module


def _session(function: Any = None, **_: Any) -> Any:
    return function or (lambda decorated: decorated)


def installs(noxfile: Any, extra: str = "dev", session: Session | None = None) -> int:
    """The number of commands of an installation."""
    session = session or Session()
    noxfile.install(session, extra)
    assert session.running == [], "nox --install-only runs only commands of the installation"
    return len(session.installing)


def test_an_environment_is_installed_once(noxfile: Any) -> None:
    assert [installs(noxfile), installs(noxfile), installs(noxfile, "test")] == [2, 0, 0]


def test_an_installation_of_the_smaller_extra_does_not_replace_that_of_the_larger_one(noxfile: Any) -> None:
    assert [installs(noxfile, "test"), installs(noxfile, "test"), installs(noxfile, "dev")] == [2, 0, 1]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(noxfile: Any, folder: Path, name: str) -> None:
    installs(noxfile)
    with (folder / name).open("a") as file:
        file.write("# another branch\n")
    assert installs(noxfile) == 1


def test_an_installation_that_failed_is_repeated(noxfile: Any) -> None:
    with pytest.raises(CommandFailed):
        installs(noxfile, session=Session(fails=lambda command: "install" in command))
    assert installs(noxfile) == 1


@pytest.mark.parametrize("text", ["", '{"of": "', "[1]", "null"])
def test_an_unreadable_stamp_is_treated_as_missing(noxfile: Any, text: str) -> None:
    installs(noxfile)
    (noxfile.ENVIRONMENT / "installed.json").write_text(text)
    assert installs(noxfile) == 1


def test_an_environment_whose_interpreter_was_removed_is_created_again(noxfile: Any) -> None:
    installs(noxfile)
    python = noxfile.ENVIRONMENT / "bin/python"
    python.unlink()
    python.symlink_to("/no/such/python")
    assert installs(noxfile) == 2
    assert python.exists()


def test_a_directory_that_is_not_an_environment_is_not_cleared(noxfile: Any) -> None:
    kept = noxfile.ENVIRONMENT / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    session = Session()
    with pytest.raises(SessionFailed, match="not a virtual environment"):
        noxfile.install(session)
    assert session.installing == []
    assert kept.read_text() == "years of work"


def test_a_second_nox_waits_until_the_first_has_installed(noxfile: Any) -> None:
    lock = noxfile.ENVIRONMENT.with_name(f".{noxfile.ENVIRONMENT.name}.lock")
    lock.parent.mkdir(parents=True)
    waits = threading.Event()
    session = Session()
    session.log = lambda *_: waits.set()
    second = threading.Thread(target=noxfile.install, args=(session,))
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second.start()
        assert waits.wait(10)
        assert session.installing == []
    second.join(10)
    assert len(session.installing) == 2


@pytest.mark.parametrize(
    ("cache", "options"), [("writable/uv", []), ("file/uv", ["--no-cache"]), ("file", ["--no-cache"])]
)
@pytest.mark.parametrize("variable", ["UV_CACHE_DIR", "XDG_CACHE_HOME"])
def test_uv_runs_without_a_cache_if_it_cannot_write_one(
    noxfile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, cache: str, options: list[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "writable").mkdir()
    monkeypatch.delenv("UV_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / cache))
    assert noxfile._without_cache() == options


# -- tests that only CI runs -------------------------------------------------------------------------------------------


def pytest_commands(session: Session) -> list[str]:
    return [line for command in session.running if "tests/unit" in (line := " ".join(command))]


def test_tests_that_the_fast_session_leaves_out_run_in_ci(noxfile: Any) -> None:
    fast, full = Session(), Session()
    noxfile.tests(fast)
    noxfile.coverage(full)
    (left_out,), (complete,) = pytest_commands(fast), pytest_commands(full)
    assert "not thorough" in left_out
    assert "--one-transport=alternate" in left_out
    assert "thorough" not in complete
    assert "--one-transport=other" in complete


def test_ci_runs_the_unit_tests_completely_on_debians_newest_python_and_takes_their_coverage_from_there(
    noxfile: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = [each for each in (ROOT / ".ci/newest-python").read_text().splitlines() if "pytest tests/unit" in each]
    assert "coverage run -m pytest tests/unit" in line
    assert '-m "not' not in line
    stages = (ROOT / ".ci/run").read_text()
    recorded = "UNIT_COVERAGE=$copy/.coverage nox -s coverage"
    assert stages.index("sid .ci/newest-python") < stages.index(recorded)
    session = Session()
    monkeypatch.setenv("UNIT_COVERAGE", "unit data")
    with pytest.raises(SessionFailed, match="unit data, which is not a file"):
        noxfile.coverage(session)
    assert session.running == []
    (folder / "unit data").touch()
    noxfile.coverage(session)
    suites = [each for command in session.running for each in command if each.startswith("tests/")]
    assert suites[:2] == ["tests/integration", "tests/chaos"]
    assert not any(each.startswith("tests/unit") for each in suites)
    assert [command[-3:] for command in session.running if "combine" in command] == [["-q", ".", "unit data"]]
    assert session.running[-1][1:] == ["report"]


def test_unit_tests_that_need_root_are_not_left_to_the_stage_of_an_ordinary_user() -> None:
    needs_root = [path for path in (ROOT / "tests/unit").rglob("test_*.py") if "uid() != 0" in path.read_text()]
    assert needs_root
    assert [path for path in needs_root if path != Path(__file__) and "thorough" in path.read_text()] == []


def test_only_suites_that_ci_runs_completely_have_thorough_tests() -> None:
    complete = ("unit", "integration", "chaos", "support", "simulation")
    others = [
        path for path in (ROOT / "tests").rglob("*.py") if path.relative_to(ROOT / "tests").parts[0] not in complete
    ]
    marked = [path for path in others if "mark.thorough" in path.read_text() or "families import" in path.read_text()]
    assert marked == []


def test_a_sample_of_a_family_is_not_empty_and_belongs_to_it() -> None:
    marked = sample(["a", "b", "c"], ["b"])
    assert [(each.values, [mark.name for mark in each.marks]) for each in marked] == [
        (("a",), ["thorough"]),
        (("b",), []),
        (("c",), ["thorough"]),
    ]
    assert [len(each.marks) for each in sample([(1, 2), (3, 4)], unpack=True)] == [0, 1]
    for wrong in ([], ["d"], 0):
        with pytest.raises(ValueError, match="a sample"):
            sample(["a", "b"], wrong)


class Item:
    """A collected test with a transport and with these markers; those of its module are last."""

    path = ROOT / "tests/integration/test_x.py"

    def __init__(self, transport: str, *markers: str) -> None:
        self.nodeid = f"tests/integration/test_x.py::test_{'_'.join(markers)}[{transport}]"
        self.callspec = SimpleNamespace(params={"transport": transport})
        self._markers = markers

    def iter_markers(self) -> Iterator[SimpleNamespace]:
        return (SimpleNamespace(name=name, args=()) for name in self._markers)

    def get_closest_marker(self, name: str) -> SimpleNamespace | None:
        return next((mark for mark in self.iter_markers() if mark.name == name), None)


def transports_of(which: str, *markers: str) -> list[str]:
    """The transports that a test with these markers runs on, with ``--one-transport=which``."""
    items: list[Any] = [Item(transport, *markers) for transport in conftest.TRANSPORTS]
    config: Any = SimpleNamespace(getoption=lambda _: which, hook=SimpleNamespace(pytest_deselected=lambda items: None))
    conftest.pytest_collection_modifyitems(config, items)
    return [item.callspec.params["transport"] for item in items]


@pytest.mark.parametrize(
    ("markers", "together"),
    [
        ((), ["grpcio", "native"]),
        (("any_transport",), ["grpcio", "native"]),
        (("every_transport",), ["grpcio", "native"]),
        (("any_transport", "every_transport"), ["grpcio", "native"]),  # the second marker is that of the module
        (("transports",), ["native"]),
    ],
)
def test_both_sessions_together_run_a_test_once_on_each_transport_and_its_own_marker_takes_precedence(
    markers: tuple[str, ...], together: list[str]
) -> None:
    assert sorted(transports_of("alternate", *markers) + transports_of("other", *markers)) == together


def test_a_test_that_names_its_transports_runs_in_the_fast_session_unless_it_is_thorough() -> None:
    for marker in ("every_transport", "transports"):
        assert transports_of("alternate", marker)
        assert transports_of("other", marker) == []
        assert transports_of("other", "thorough", marker)


def test_a_thorough_test_runs_on_one_transport_unless_it_is_marked_for_every_one() -> None:
    assert len(transports_of("other", "thorough")) == 1
    assert transports_of("other", "thorough", "every_transport") == ["grpcio", "native"]


@pytest.mark.parametrize(("markers", "seen"), [(("thorough",), None), ((), "settings")], ids=["thorough", "other"])
def test_the_servers_of_a_thorough_test_run_without_coverage(
    monkeypatch: pytest.MonkeyPatch, markers: tuple[str, ...], seen: str | None
) -> None:
    monkeypatch.setenv("COVERAGE_PROCESS_CONFIG", "settings")
    item: Any = Item("native", *markers)
    test = conftest.pytest_runtest_protocol(item)
    next(test)
    assert os.environ.get("COVERAGE_PROCESS_CONFIG") == seen
    with pytest.raises(StopIteration):
        test.send(None)
    assert os.environ["COVERAGE_PROCESS_CONFIG"] == "settings"


# -- tests that fail in parallel ---------------------------------------------------------------------------------------


class Judged(Session):
    """A session in which pytest ends with ``code``."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self._code = code

    def run(self, *command: str, **options: Any) -> None:
        super().run(*command, **options)
        if command[0].endswith("pytest"):
            raise CommandFailed(self._code)


def test_in_ci_failed_tests_run_again_alone(noxfile: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    stale = folder / ".pytest_cache/a session/v/cache/lastfailed"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"tests/of_an_earlier_run.py": true}')
    session = Judged(1)
    noxfile.run_tests(session, "tests/unit")
    assert not stale.exists()
    assert session.running[0][-2:] == ["-o", "cache_dir=.pytest_cache/a session"]
    assert session.running[1][1:] == [".ci/failed-alone", ".pytest_cache/a session/v/cache/lastfailed"]


@pytest.mark.parametrize(("ci", "code"), [("", 1), ("true", 2), ("true", 3), ("true", 5), ("true", -9)])
def test_a_run_that_was_not_finished_or_is_not_in_ci_fails_at_once(
    noxfile: Any, monkeypatch: pytest.MonkeyPatch, ci: str, code: int
) -> None:
    monkeypatch.setenv("CI", ci)
    session = Judged(code)
    with pytest.raises(CommandFailed):
        noxfile.run_tests(session, "tests/unit")
    assert len(session.running) == 1


@pytest.mark.parametrize(("code", "kept"), [(1, True), (2, False), (-9, False)])
def test_a_parallel_session_leaves_its_failed_tests_to_ci_unless_the_run_was_unfinished(
    noxfile: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, kept: bool
) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("CI_BESIDE", "true")
    listed = folder / ".pytest_cache/a session/v/cache/lastfailed"
    session = Judged(code)

    def run(*command: str, **options: Any) -> None:
        listed.parent.mkdir(parents=True)
        listed.write_text('{"tests/test_of_this_run.py": true}')
        Judged.run(session, *command, **options)

    monkeypatch.setattr(session, "run", run)
    with pytest.raises(CommandFailed):
        noxfile.run_tests(session, "tests/judges")
    assert len(session.running) == 1
    assert listed.exists() == kept


@pytest.mark.thorough  # starts pytest
@pytest.mark.parametrize(
    ("failed", "code", "says"),
    [
        (["test_it.py::test_that_passes"], 0, "!! test_it.py::test_that_passes"),
        (["test_it.py::test_that_passes", "test_it.py::test_that_fails"], 1, "1 failed, 1 passed"),
        ([f"test_it.py::test_{number}" for number in range(6)], 1, "6 tests failed: too many"),
        ([], 1, "names no test"),
        (None, 1, "names no test"),
    ],
    ids=["passes", "fails-alone-too", "too-many", "empty", "no-list"],
)
def test_a_test_that_failed_in_parallel_must_pass_alone(
    tmp_path: Path, failed: list[str] | None, code: int, says: str
) -> None:
    (tmp_path / "test_it.py").write_text("def test_that_passes(): pass\ndef test_that_fails(): assert False\n")
    listed = tmp_path / "lastfailed"
    if failed is not None:
        listed.write_text(json.dumps(dict.fromkeys(failed, True)))
    made = subprocess.run(
        [sys.executable, str(ROOT / ".ci/failed-alone"), str(listed)], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == code, made.stdout + made.stderr
    assert says in made.stdout
