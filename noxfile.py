"""Every check of the project, each as one command: ``nox -s lint types tests``."""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

CONSTRAINTS = "constraints.txt"
GENERATED = Path("service/definition_server/rpc")
DRILLS = ("*/test_drill*.py", "*/test_soak.py")
SUITES = ("unit", "fuzz", "simulation", "integration", "chaos")


def install(session: nox.Session) -> None:
    """The project as it lies here, with the pinned versions of everything else."""
    session.install("-q", "-e", ".[dev]", "-c", CONSTRAINTS)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff check and format."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types: mypy, strict."""
    install(session)
    session.run("mypy")


def run_suites(session: nox.Session, *suites: str) -> None:
    """Run test suites; what follows ``--`` on nox's command line goes to pytest."""
    install(session)
    session.run("python", "-m", "pytest", *(f"tests/{suite}" for suite in suites), *session.posargs)


@nox.session
def unit(session: nox.Session) -> None:
    """Tests of parts, without a database."""
    run_suites(session, "unit")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Any octets to the engine, from a kept corpus and from Hypothesis, for a bounded time."""
    run_suites(session, "fuzz")


@nox.session
def simulation(session: nox.Session) -> None:
    """The engine under simulation; with ``-- --seeds N --start S`` that many seeds instead of the suite."""
    if any(each.startswith("--s") for each in session.posargs):
        install(session)
        session.run("python", "-m", "tests.simulation.engine", *session.posargs)
    else:
        run_suites(session, "simulation")


@nox.session
def integration(session: nox.Session) -> None:
    """Tests of the whole on a real PostgreSQL."""
    run_suites(session, "integration")


@nox.session
def chaos(session: nox.Session) -> None:
    """Faults under load; with `-- --target HOST:PORT` or `-- --list`: drills on a server that runs (docs/drills.md)."""
    if any(each.partition("=")[0] in ("--target", "--list") for each in session.posargs):
        install(session)
        session.run("python", "-m", "tests.chaos.drill", *session.posargs)
    else:
        run_suites(session, "chaos")


@nox.session
def soak(session: nox.Session) -> None:
    """Random faults under load for hours: `-- --minutes N [--seed S]` (docs/drills.md)."""
    install(session)
    session.run("python", "-m", "tests.chaos.soak", *session.posargs)


@nox.session
def containers(session: nox.Session) -> None:
    """The image: built, run, replaced under load. Wants a Docker engine; BASE_IMAGE names the image to build on."""
    run_suites(session, "containers")


@nox.session
def tests(session: nox.Session) -> None:
    """Unit, fuzz, integration and chaos tests in one run, with coverage of every process (at least 95 %).

    Without the drills, which take their time and want a quiet machine: `nox -s chaos` plays them.
    """
    install(session)
    session.run("coverage", "erase")
    suites = [f"tests/{suite}" for suite in SUITES]
    session.run(
        "coverage", "run", "-m", "pytest", *suites, *(f"--ignore-glob={each}" for each in DRILLS), *session.posargs
    )
    session.run("coverage", "combine", "-q")
    session.run("coverage", "report")


@nox.session
def judges(session: nox.Session) -> None:
    """Programs of others judge the transport: docs/conformance.md, with what has to be installed."""
    install(session)
    session.run("python", "-m", "pytest", "tests/judges", *session.posargs)


@nox.session
def deploy(session: nox.Session) -> None:
    """What operators deploy with: manifests, SQL, alerts, dashboard, guide, runbooks. Wants Go, prometheus and jq."""
    run_suites(session, "deploy")


@nox.session
def peers(session: nox.Session) -> None:
    """Build the servers on other stacks that ours is measured beside; a missing toolchain skips one with a line."""
    install(session)
    session.run("python", "-m", "perf.peers", "build", *session.posargs)


@nox.session
def proto(session: nox.Session) -> None:
    """Regenerate the protobuf code; in CI (CI is set) fail where the committed code is stale."""
    install(session)
    before = {path: path.read_bytes() for path in sorted(GENERATED.glob("*_pb2*"))}
    session.run(
        "python", "-m", "grpc_tools.protoc",
        # The virtual path makes the generated imports absolute.
        "-Idefinition_server/rpc=proto",
        "--python_out=service", "--grpc_python_out=service", "--mypy_out=service",
        "definition_server/rpc/avap.proto",
    )  # fmt: skip
    after = {path: path.read_bytes() for path in sorted(GENERATED.glob("*_pb2*"))}
    if os.environ.get("CI") and before != after:
        session.error("The generated code is stale: run `nox -s proto` and commit the result.")


@nox.session
def perf(session: nox.Session) -> None:
    """Measure and judge by perf/sla.toml: 5 min; `-- --quick`: 1; `-- --full`; `-- --against REV`. Wants quiet."""
    install(session)
    session.run("python", "-m", "perf", *session.posargs)


@nox.session
def report(session: nox.Session) -> None:
    """Write a page with charts of the newest kept measurement; a file after -- names another."""
    install(session)
    session.run("python", "-m", "perf.report", *session.posargs)


@nox.session
def witness(session: nox.Session) -> None:
    """Measure with h2load and ghz beside our own generator: do they agree? `-- --keep` keeps the record."""
    install(session)
    session.run("python", "-m", "perf.witness", *session.posargs)


@nox.session(name="perf-catalogue")
def perf_catalogue(session: nox.Session) -> None:
    """Measure 100,000 definitions of 2 kB; fails where a promised limit is not kept. Wants a quiet machine."""
    install(session)
    session.run("python", "-m", "perf.catalogue_100k", *session.posargs)


@nox.session(name="perf-native")
def perf_native(session: nox.Session) -> None:
    """Measure the native transport beside nghttpd and grpcio, and under attack. Wants h2load, nghttpd and quiet."""
    install(session)
    session.run("python", "-m", "perf.native_bench", *session.posargs)


@nox.session
def reference(session: nox.Session) -> None:
    """Write docs/settings.md from the declaration of the settings."""
    install(session)
    page = session.run("definition-server", "config", "--reference", silent=True)
    Path("docs/settings.md").write_text(page or "", encoding="utf-8")
