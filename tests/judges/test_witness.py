"""Independent generators see what ours sees: throughput as h2load, P95 as ghz; or it is said why not, with figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from perf.benches import witness
from perf.benches.witness import latency, parsed_ghz, throughput
from perf.targets.catalogue import Catalogue
from perf.targets.target import TargetFailed
from tests.judges.tools import command, may_build, missing
from tests.support.machine import TooFewCpus, need_cpus

SECONDS = 2.0


@pytest.fixture(scope="module")
def catalogue() -> Iterator[Catalogue]:
    made = Catalogue(1000, witness.ANSWER)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def two_cpus(request: pytest.FixtureRequest) -> None:
    """Server and generator need a CPU each where anything is measured."""
    if "catalogue" in request.fixturenames:
        try:
            need_cpus()
        except TooFewCpus as error:
            missing(str(error))


@pytest.mark.timeout(180)
def test_our_throughput_agrees_with_h2load(catalogue: Catalogue) -> None:
    command("h2load", "Debian nghttp2-client")
    found = witness.settled(lambda: witness.by_h2load(catalogue, SECONDS))
    assert [each for each in found if each.verdict == "disagrees"] == []
    assert any(each.agrees for each in found)


@may_build
def test_our_p95_agrees_with_ghz(catalogue: Catalogue) -> None:
    command("go", "Go 1.26")
    witness.build()
    found = witness.settled(lambda: witness.by_ghz(catalogue, SECONDS))
    assert [each for each in found if each.verdict == "disagrees"] == []
    assert found[0].agrees, "the server with known delays leaves no excuse"
    assert 30 <= found[0].ours < 36


# -- the verdicts, which must be able to say no ------------------------------------------------------------------


def ran(rate: float, *, microseconds: float, client: float = 0.5) -> dict[str, Any]:
    """A run of 2 s in which a call took the server so long."""
    return {
        "rate": rate, "answered": rate * 2, "seconds": 2.0, "server_cpu_seconds": rate * 2 * microseconds / 1e6,
        "client_cpu_seconds": 2.0 * client,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (ran(110_000, microseconds=9), ran(100_000, microseconds=10), "agrees"),
        (ran(116_000, microseconds=8), ran(100_000, microseconds=9), "explained"),
        # Counted twice as many as there were: the server's own time does not say so.
        (ran(200_000, microseconds=10), ran(100_000, microseconds=10), "disagrees"),
        (ran(50_000, microseconds=10), ran(100_000, microseconds=10), "disagrees"),
        (ran(50_000, microseconds=10, client=0.99), ran(100_000, microseconds=10), "explained"),
    ],
)
def test_a_difference_in_rate_is_explained_only_by_measured_cpu_time(
    ours: dict[str, Any], theirs: dict[str, Any], verdict: str
) -> None:
    assert throughput(ours, theirs, "h2load", "test").verdict == verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "own", "verdict"),
    [
        (30.0, 33.0, 80, "agrees"),
        (0.09, 0.6, 80, "explained"),
        (10.0, 30.0, 80, "disagrees"),  # 80 µs of its own do not make 20 ms
        (30.0, 10.0, 80, "disagrees"),
        (0.6, 0.09, 800, "disagrees"),  # a witness that is faster than ours has no excuse to give
    ],
)
def test_a_difference_in_p95_is_explained_only_by_the_time_of_ghz(
    ours: float, theirs: float, own: float, verdict: str
) -> None:
    run = {"latency": {"p95": theirs}, "client_us_per_call": own}
    assert latency({"latency": {"p95": ours}}, run, "test").verdict == verdict


REPORT: dict[str, Any] = {
    "count": 2, "rps": 10.5, "statusCodeDistribution": {"OK": 2},
    "latencyDistribution": [{"percentage": 95, "latency": 1_500_000}],
}  # fmt: skip


def test_the_report_of_ghz_is_read() -> None:
    assert parsed_ghz(json.dumps(REPORT)) == {"rate": 10.5, "answered": 2, "latency": {"p95": 1.5}}


@pytest.mark.parametrize(
    "change",
    [
        {"statusCodeDistribution": {"OK": 1, "Unavailable": 1}}, {"statusCodeDistribution": {"OK": 1}},
        {"latencyDistribution": []}, {"latencyDistribution": None}, {"count": 0, "statusCodeDistribution": {}},
        {"rps": "x"},
    ],
)  # fmt: skip
def test_a_report_of_ghz_with_anything_but_good_answers_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(TargetFailed, match="ghz: "):
        parsed_ghz(json.dumps(REPORT | change))


def test_an_output_that_is_not_a_report_is_refused() -> None:
    with pytest.raises(TargetFailed, match="connection refused"):
        parsed_ghz("", "connection refused")
