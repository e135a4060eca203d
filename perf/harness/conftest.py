"""The gates as tests: the set that is measured, and the one measurement that all of them judge."""

from __future__ import annotations

import os
import time

import pytest
from tests.support import machine

from perf.generator import scenarios
from perf.harness import measure as cli
from perf.harness import outcome, sla
from perf.harness.run import Session

SET = "PERF_SET"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "perf: measures the server; needs a quiet machine (nox -s perf)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each gate of the set."""
    if "gate" in metafunc.fixturenames:
        known = scenarios.load()
        chosen = {each.name for each in scenarios.chosen(known, which())}
        gates = [gate for gate in sla.load(scenarios=known).gates if gate.scenario in chosen]
        metafunc.parametrize("gate", gates, ids=[f"{gate.name} [{gate.scenario}]" for gate in gates])


def which() -> str:
    """The set to measure: ``PERF_SET``, or the quick one."""
    return os.environ.get(SET, "quick")


@pytest.fixture(scope="session")
def measured() -> Session:
    """One measurement for all gates, in rounds, so that servers that a gate compares are measured at the same time."""
    try:
        machine.need_cpus()
    except machine.TooFewCpus as error:
        pytest.fail(str(error))
    from perf.generator.run import run

    rules, known = sla.load(), scenarios.load()
    arguments = cli.parser().parse_args([] if which() == "standard" else [f"--{which()}"])
    session = Session(run, rules.noise, say=outcome.Line(outcome.console(), time.monotonic()))
    with cli.on_the_clients_cpu():
        session.measure(cli.plans(arguments, rules, known))
    return session
