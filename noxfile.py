"""All checks of the project, each as one command: ``nox -s lint types tests``."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nox
import nox.command

nox.options.sessions = ["lint", "types", "tests"]

CONSTRAINTS = Path("constraints.txt")
GENERATED = Path("service/definition_server/rpc")
DRILLS = ("*/test_drill*.py", "*/test_soak.py")
SUITES = ("unit", "fuzz", "simulation", "integration", "chaos")
SIDE_BY_SIDE = ("-n", str(len(os.sched_getaffinity(0)) + 1), "--dist", "worksteal")
"""pytest's options; one process more than CPUs, since many tests wait."""
COMPILED_TESTS = (
    *(f"tests/unit/grpc_h2/{room}" for room in ("connection", "rpc", "static", "wire")),
    "tests/fuzz",
    "tests/simulation/engine",
    "tests/judges/test_h2spec.py",
    "tests/judges/test_differential.py",
    "tests/integration/test_serving.py",
    "tests/integration/test_jail.py",
    "tests/integration/test_key_rotation.py",
)
COMPILED_MARKS = "not slow and not quiet and not thorough and not interpreted"
"""The tests of the session ``compiled``: all tests of the engine, and some of the whole server."""
MUTATION_TOOL = ("cosmic-ray==8.7.0", "-c", "constraints.txt")
"""The packages that only the session ``mutants`` needs."""
TESTS_FAILED, NOTHING_COLLECTED = 1, 5
"""pytest's exit codes if tests failed, and if none was selected."""

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
ENVIRONMENT = Path(os.environ.get("NOX_ENVIRONMENT") or f".nox/python{VERSION}").absolute()
"""The one environment of all sessions, with the Python that runs nox; ``NOX_ENVIRONMENT`` overrides its path."""

# Each session uses the environment above: nox itself creates none.
nox.options.default_venv_backend = "none"


def install(session: nox.Session, extra: str = "dev") -> None:
    """Install this working tree and the pinned versions of everything else, unless they are installed already.

    ``extra`` is ``test``, the requirements of the README's test command, or ``dev``, which contains it.
    """
    session.env.update(
        {"VIRTUAL_ENV": str(ENVIRONMENT), "PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    )
    # Without this variable, each module is compiled once and not in each process.
    session.env["PYTHONDONTWRITEBYTECODE"] = None
    with _lock(session):
        _install(session, extra)


def _install(session: nox.Session, extra: str) -> None:
    wanted = hashlib.sha256(
        b"\0".join([Path("pyproject.toml").read_bytes(), CONSTRAINTS.read_bytes(), bytes(Path.cwd())])
    ).hexdigest()
    stamp, python = ENVIRONMENT / "installed.json", ENVIRONMENT / "bin/python"
    installed = _read_stamp(stamp)
    # The interpreter is a link, whose target is missing if the machine's Python was removed.
    if installed.get("of") == wanted and installed.get("extra") in (extra, "dev") and python.exists():
        return
    stamp.unlink(missing_ok=True)
    if ENVIRONMENT.exists() and not python.exists():
        _remove_broken(session)
    # run_install, not run: `nox --install-only` skips what `run` would do.
    what = ("-e", f".[{extra}]", "-c", str(CONSTRAINTS))
    if not _install_by_uv(session, *what):
        if not (ENVIRONMENT / "bin/pip").exists():
            session.run_install(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT), external=True)
        session.run_install(str(python), "-m", "pip", "install", "-q", "--no-compile", *what, external=True)
    stamp.write_text(json.dumps({"of": wanted, "extra": extra}))


@contextmanager
def _lock(session: nox.Session) -> Iterator[None]:
    """Keeps a second nox from installing at the same time."""
    path = ENVIRONMENT.with_name(f".{ENVIRONMENT.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            session.log("another nox installs into the same environment: waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_stamp(stamp: Path) -> dict[str, str]:
    """The installed packages; empty if the file is missing or cut off."""
    try:
        return dict(json.loads(stamp.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _remove_broken(session: nox.Session) -> None:
    """Remove an environment without an interpreter. Fail if the directory is not an environment."""
    if any(ENVIRONMENT.iterdir()) and not (ENVIRONMENT / "pyvenv.cfg").exists():
        session.error(
            f"{ENVIRONMENT} is not a virtual environment: remove it, or name another directory in NOX_ENVIRONMENT"
        )
    shutil.rmtree(ENVIRONMENT)


def _install_by_uv(session: nox.Session, *what: str) -> bool:
    """Install with uv. False if uv is missing or fails, for example because only pip is configured for the index."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        return False
    python = str(ENVIRONMENT / "bin/python")
    quiet = ("-q", *_without_cache())
    try:
        if not Path(python).exists():
            session.run_install(uv, "venv", *quiet, "--python", sys.executable, str(ENVIRONMENT), external=True)
        session.run_install(uv, "pip", "install", *quiet, "--python", python, *what, external=True)
    except nox.command.CommandFailed:
        session.log("uv cannot install: pip is tried")
        return False
    return True


def _without_cache() -> list[str]:
    """The option with which uv uses no cache, for a user without a writable directory for it (no home, or a read-only
    one), for whom uv would fail.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # this user has no home
        return ["--no-cache"]
    cache = Path(os.environ.get("UV_CACHE_DIR") or caches / "uv")
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    return [] if existing.is_dir() and os.access(existing, os.W_OK) else ["--no-cache"]


def run(session: nox.Session, command: str, *arguments: str, **options: Any) -> Any:
    """Run a command of the environment, or the one with that absolute path."""
    return session.run(str(ENVIRONMENT / "bin" / command), *arguments, external=True, **options)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff check and format."""
    install(session)
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types: mypy, strict."""
    install(session)
    run(session, "mypy")


def run_tests(
    session: nox.Session,
    *arguments: str,
    by: Sequence[str] = ("pytest",),
    again: Sequence[str] = ("python",),
    **options: Any,
) -> None:
    """Run pytest. In CI (CI is set), the tests that failed run again alone, and only this run decides. It follows at
    once, or, if ``CI_BESIDE`` says that another session runs at the same time, after this session. ``again``: the
    Python of that run, and options of pytest.
    """
    cache = Path(".pytest_cache", session.name)  # separate, because two sessions may run at the same time
    last = cache / "v/cache/lastfailed"
    if os.environ.get("CI"):
        last.unlink(missing_ok=True)
        arguments += ("-o", f"cache_dir={cache}")
    try:
        run(session, *by, *arguments, **options)
    except nox.command.CommandFailed as failed:
        # Every other code means that the run was not finished.
        finished = getattr(failed, "return_code", None) == TESTS_FAILED
        if os.environ.get("CI") and not finished:
            last.unlink(missing_ok=True)
        if not os.environ.get("CI") or not finished or os.environ.get("CI_BESIDE"):
            raise
        run(session, again[0], ".ci/failed-alone", str(last), *again[1:])


def run_suites(session: nox.Session, *suites: str) -> None:
    """Run test suites; arguments after ``--`` on nox's command line go to pytest."""
    install(session)
    run_tests(session, *(f"tests/{suite}" for suite in suites), *session.posargs)


@nox.session
def quick(session: nox.Session) -> None:
    """The fast unit tests, in parallel, for use while you work."""
    install(session, "test")
    run(
        session,
        "pytest",
        "tests/unit",
        "-q",
        "-m",
        "not slow and not quiet and not thorough",
        "--cpu-limit=3",
        *SIDE_BY_SIDE,
        *session.posargs,
    )


@nox.session
def unit(session: nox.Session) -> None:
    """Tests of parts, without a database."""
    run_suites(session, "unit")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz the engine with a stored corpus and with Hypothesis, for a limited time."""
    session.env["HYPOTHESIS_PROFILE"] = os.environ.get("HYPOTHESIS_PROFILE") or "long"
    run_suites(session, "fuzz")


@nox.session
def simulation(session: nox.Session) -> None:
    """Engine and publication under simulation. `-- engine --seeds N --start S` runs N seeds from S on instead."""
    if session.posargs and session.posargs[0] in ("engine", "publication"):
        install(session)
        run(session, "python", "-m", f"tests.simulation.{session.posargs[0]}", *session.posargs[1:])
    else:
        run_suites(session, "simulation")


@nox.session
def integration(session: nox.Session) -> None:
    """Tests of the whole server on a real PostgreSQL."""
    run_suites(session, "integration")


@nox.session
def chaos(session: nox.Session) -> None:
    """Faults under load; with `-- --target HOST:PORT` or `-- --list`: drills on a running server (docs/drills.md)."""
    if any(each.partition("=")[0] in ("--target", "--list") for each in session.posargs):
        install(session)
        run(session, "python", "-m", "tests.chaos.drill", *session.posargs)
    else:
        run_suites(session, "chaos")


@nox.session
def soak(session: nox.Session) -> None:
    """Random faults under load for hours: `-- --minutes N [--seed S]` (docs/drills.md)."""
    install(session)
    run(session, "python", "-m", "tests.chaos.soak", *session.posargs)


@nox.session
def containers(session: nox.Session) -> None:
    """Tests that build the image, run it and replace it under load. Needs a Docker engine; BASE_IMAGE and BUILD_IMAGE
    name the images from which it is made."""
    run_suites(session, "containers")


def run_all(
    session: nox.Session, *pytest: str, suites: Sequence[str] = SUITES, options: Sequence[str] = (), thorough: bool
) -> None:
    """Run the tests of ``suites``, without drills: first in parallel, then the quiet ones alone. Thorough tests run
    only if ``thorough`` is set.
    """
    where = [*(f"tests/{suite}" for suite in suites), *(f"--ignore-glob={each}" for each in DRILLS)]
    left_out = "" if thorough else " and not thorough"
    run_tests(session, *where, "-q", "-m", f"not quiet{left_out}", *options, *SIDE_BY_SIDE, *session.posargs, by=pytest)
    files = (path for suite in suites for path in sorted(Path("tests", suite).rglob("test_*.py")))
    others = (path for path in files if not any(path.match(each) for each in DRILLS))
    if quiet := [str(path) for path in others if "pytest.mark.quiet" in path.read_text()]:
        codes = [0, NOTHING_COLLECTED]  # the second: -k has selected no test
        run_tests(
            session, *quiet, "-q", "-m", f"quiet{left_out}", *options, *session.posargs, by=pytest, success_codes=codes
        )


@nox.session
def tests(session: nox.Session) -> None:
    """Unit, fuzz, simulation, integration and chaos tests, in parallel; quiet tests run alone at the end.

    The drills, which take long, are left out: `nox -s chaos` runs them. Each test with a whole server runs on one of
    the two transports, half of the tests on each; `nox -s coverage` runs them on the other one, and the tests marked
    `thorough`.
    """
    install(session, "test")
    run_all(session, "pytest", options=["--one-transport=alternate"], thorough=False)


@nox.session
def coverage(session: nox.Session) -> None:
    """Unit, integration and chaos tests with coverage of every process (at least 95 %), with all Hypothesis examples.
    Tests with whole servers run on the transport on which `nox -s tests` does not run them. The servers of thorough
    tests run without coverage; tests of perf cover nothing of the server. `UNIT_COVERAGE=FILE`: the unit tests have run
    elsewhere, and FILE holds their coverage.
    """
    install(session)
    session.env["HYPOTHESIS_PROFILE"] = os.environ.get("HYPOTHESIS_PROFILE") or "long"
    recorded = os.environ.get("UNIT_COVERAGE")
    if recorded and not Path(recorded).is_file():
        session.error(f"UNIT_COVERAGE names {recorded}, which is not a file: run the unit tests under coverage first")
    run(session, "coverage", "erase")
    covering = ("integration", "chaos") if recorded else ("unit", "integration", "chaos")
    options = ("--one-transport=other", "--ignore=tests/unit/perf")
    run_all(session, "coverage", "run", "-m", "pytest", suites=covering, options=options, thorough=True)
    # Without arguments, `combine` takes the records of this folder.
    run(session, "coverage", "combine", "-q", *((".", recorded) if recorded else ()))
    run(session, "coverage", "report")


@nox.session
def mutants(session: nox.Session) -> None:
    """Put small faults into the code and see whether the tests notice: `-- --sample 200 --seed 1` (docs/testing.md).

    `-- --listed` tries only the faults that the project lists.
    """
    install(session)
    if not _install_by_uv(session, *MUTATION_TOOL):
        run(session, "python", "-m", "pip", "install", "-q", *MUTATION_TOOL)
    run_tests(session, "-q", "tests/mutants")
    if "--listed" not in session.posargs:
        run(session, "python", "-m", "tests.mutants", *session.posargs)


@nox.session
def judges(session: nox.Session) -> None:
    """Independent programs judge the transport; docs/conformance.md lists them and the required tools."""
    install(session)
    run_tests(session, "tests/judges", *session.posargs)


@nox.session
def deploy(session: nox.Session) -> None:
    """Tests of manifests, SQL, alerts, dashboard, operations guide and runbooks. Needs Go, prometheus and jq."""
    run_suites(session, "deploy")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build two wheels into dist/: one with the compiled engine, for this Python and system, and a pure one for every
    Python.
    """
    install(session)
    for wanted in ("required", "0"):
        build_wheel(session, Path("dist"), compiled_engine=wanted)


def build_wheel(session: nox.Session, folder: Path, *, compiled_engine: str) -> None:
    """``compiled_engine``: see hatch_build.py."""
    arguments = ("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    run(session, "python", *arguments, env={"COMPILED_ENGINE": compiled_engine})


@nox.session
def compiled(session: nox.Session) -> None:
    """Build the compiled engine, and test it and its build: unit tests, fuzzing, simulation, h2spec, the differential
    run, whole servers. Needs a C compiler and Go. Arguments after `--` replace the tests.
    """
    install(session)
    if not session.posargs:
        run(session, "pytest", "-q", "-p", "no:cacheprovider", *SIDE_BY_SIDE, "tests/unit/test_compiled_engine.py")
    tree = ENVIRONMENT.with_name(f"{ENVIRONMENT.name}-compiled").resolve()
    run(session, "python", "-m", "venv", "--clear", "--without-pip", str(tree))
    build_wheel(session, tree / "wheel", compiled_engine="required")
    packages = Path("lib", f"python{VERSION}", "site-packages")
    for wheel in (tree / "wheel").glob("*.whl"):  # none under `nox --install-only`
        run(session, "python", "-m", "zipfile", "-e", str(wheel), str(tree / packages))
        # The rest comes from the environment. Its own .pth file, that of the editable installation, has no effect.
        (tree / packages / "others.pth").write_text(f"{ENVIRONMENT.resolve() / packages}\n")
    tests = session.posargs or [*COMPILED_TESTS, "-q", "-m", COMPILED_MARKS, *SIDE_BY_SIDE]
    python, form = str(tree / "bin/python"), "--engine=compiled"
    run_tests(session, form, "--one-transport=alternate", *tests, by=(python, "-m", "pytest"), again=(python, form))


@nox.session
def peers(session: nox.Session) -> None:
    """Build the servers on other gRPC stacks for comparison; a server whose toolchain is missing is skipped with a
    message.
    """
    install(session)
    run(session, "python", "-m", "perf", "peers", "build", *session.posargs)


@nox.session
def proto(session: nox.Session) -> None:
    """Regenerate the protobuf code; in CI (CI is set) fail if the committed code is stale."""
    install(session)
    before = {path: path.read_bytes() for path in sorted(GENERATED.glob("*_pb2*"))}
    run(
        session, "python", "-m", "grpc_tools.protoc",
        # The virtual path makes the generated imports absolute.
        "-Idefinition_server/rpc=service/definition_server/proto",
        "--python_out=service", "--grpc_python_out=service", "--mypy_out=service",
        "definition_server/rpc/avap.proto", "definition_server/rpc/avap_control.proto",
    )  # fmt: skip
    after = {path: path.read_bytes() for path in sorted(GENERATED.glob("*_pb2*"))}
    if os.environ.get("CI") and before != after:
        session.error("The generated code is stale: run `nox -s proto` and commit the result.")


@nox.session
def perf(session: nox.Session) -> None:
    """Measure and judge by perf/sla.toml: 5 min; `-- --quick`: 1; `-- --full`: 25; `-- --against REV`. Needs a quiet
    machine.
    """
    install(session)
    run(session, "python", "-m", "perf", "measure", *session.posargs)


@nox.session
def attacks(session: nox.Session) -> None:
    """Attack a whole server and measure its other clients and its memory; `-- --short`: 2 min, as CI does."""
    install(session)
    run(session, "python", "-m", "perf", "attacks", *session.posargs)


@nox.session
def report(session: nox.Session) -> None:
    """Write a page with charts of the newest stored measurement, or of the file named after --."""
    install(session)
    run(session, "python", "-m", "perf", "report", *session.posargs)


@nox.session
def witness(session: nox.Session) -> None:
    """Compare our generator with h2load and ghz. `-- --keep` stores the record."""
    install(session)
    run(session, "python", "-m", "perf", "witness", *session.posargs)


@nox.session(name="perf-catalogue")
def perf_catalogue(session: nox.Session) -> None:
    """Measure 100,000 definitions of 2 kB; fails if a promised limit is exceeded. Needs a quiet machine."""
    install(session)
    run(session, "python", "-m", "perf", "catalogue", *session.posargs)


@nox.session(name="perf-native")
def perf_native(session: nox.Session) -> None:
    """Compare the native transport with nghttpd and grpcio, also under attack. Needs h2load, nghttpd and a quiet
    machine.
    """
    install(session)
    run(session, "python", "-m", "perf", "native", *session.posargs)


@nox.session
def reference(session: nox.Session) -> None:
    """Write docs/settings.md from the declaration of the settings."""
    install(session)
    page = run(session, "definition-server", "config", "--reference", silent=True)
    if page:  # `nox --install-only` runs nothing
        Path("docs/settings.md").write_text(page, encoding="utf-8")
