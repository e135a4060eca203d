"""Our generator agrees with independent generators: with h2load on throughput, and with ghz on P95. Otherwise the
comparison gives the reason with figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from perf.benches import witness
from perf.benches.witness import added, known, latency, parsed_ghz, throughput
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
    """A measurement needs one CPU for the server and one for the generator."""
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
    delays, holds, _ = found
    assert delays.agrees, "with the server of known delays no reason is accepted"
    assert 30 <= delays.ours < 36
    assert holds.agrees, "nor with the server that holds every call"
    assert holds.ours >= 0.95 * holds.theirs, "no call can be faster, except by a tick of the clock (1 ms)"


# -- the verdicts, which must be able to disagree ----------------------------------------------------------------


def ran(rate: float, *, microseconds: float, client: float = 0.5) -> dict[str, Any]:
    """A run of 2 s in which each call took ``microseconds`` of the server's CPU time."""
    return {
        "rate": rate, "answered": rate * 2, "seconds": 2.0, "server_cpu_seconds": rate * 2 * microseconds / 1e6,
        "client_cpu_seconds": 2.0 * client,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (ran(110_000, microseconds=9), ran(100_000, microseconds=10), "agrees"),
        (ran(116_000, microseconds=8), ran(100_000, microseconds=9), "explained"),
        # Twice as many calls are counted as were made, which the server's CPU time does not explain.
        (ran(200_000, microseconds=10), ran(100_000, microseconds=10), "disagrees"),
        (ran(50_000, microseconds=10), ran(100_000, microseconds=10), "disagrees"),
        (ran(50_000, microseconds=10, client=0.99), ran(100_000, microseconds=10), "explained"),
    ],
)
def test_a_difference_in_rate_is_explained_only_by_measured_cpu_time(
    ours: dict[str, Any], theirs: dict[str, Any], verdict: str
) -> None:
    assert throughput(ours, theirs, "h2load", "test").verdict == verdict


def p95(milliseconds: float, rate: float = 8750.0, microseconds: float = 80.0) -> dict[str, Any]:
    """A run in which the generator took this much of its own CPU time for each call."""
    return {"latency": {"p95": milliseconds}, "rate": rate, "client_us_per_call": microseconds}


HELD = 20.0


@pytest.mark.parametrize(
    ("ours", "theirs", "held", "verdict"),
    [
        (30.0, 33.0, None, "agrees"),
        (30.0, 45.0, None, "disagrees"),
        # On a quiet machine, ghz adds half a millisecond to every call.
        (0.09, 0.6, (20.4, 21.0), "explained"),
        # On two busy CPUs, ghz has to wait for a CPU, and adds as much to the known time.
        (0.8, 6.4, (21.0, 27.5), "explained"),
        (0.8, 6.4, (21.0, 23.5), "disagrees"),
        # Our figure is wrong, and ghz had enough CPU time to show it.
        (0.09, 5.1, (20.4, 21.0), "disagrees"),
        (0.8, 25.0, (21.0, 27.5), "disagrees"),
        # A witness that is faster than our generator needs no explanation.
        (6.4, 0.8, (20.4, 27.5), "disagrees"),
        # Our figure of the known time is too small as well, which does not increase the time that ghz adds.
        (0.05, 1.5, (16.1, 20.6), "disagrees"),
    ],
)
def test_a_difference_in_p95_is_explained_only_by_the_time_that_ghz_adds_to_a_known_one(
    ours: float, theirs: float, held: tuple[float, float] | None, verdict: str
) -> None:
    extra = added(p95(held[0]), p95(held[1]), HELD) if held else 0.0
    made = latency(p95(ours), p95(theirs), "test", added_ms=extra)
    assert made.verdict == verdict
    assert ("70% busy" in made.reason) == (verdict == "explained")


def test_a_witness_that_adds_no_time_explains_no_difference() -> None:
    assert added(p95(21.0), p95(20.5), HELD) == 0.0


@pytest.mark.parametrize(
    ("ours", "verdict"), [(20.5, "agrees"), (23.9, "agrees"), (15.0, "disagrees"), (25.0, "disagrees")]
)
def test_our_p95_of_held_calls_is_judged_only_by_the_known_time(ours: float, verdict: str) -> None:
    assert known(p95(ours), HELD, "test").verdict == verdict


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
def test_a_report_of_ghz_with_failed_answers_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(TargetFailed, match="ghz: "):
        parsed_ghz(json.dumps(REPORT | change))


def test_an_output_that_is_not_a_report_is_refused() -> None:
    with pytest.raises(TargetFailed, match="connection refused"):
        parsed_ghz("", "connection refused")
