"""The simulation agrees with its model, so the numbers of docs/capacity.md are reliable."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perf.benches.database_cost import Cost, costs
from perf.planning import simulation
from perf.planning.simulation import BLOCK, Fleet, Sharing, at, one_change, rest, simulate, slowest_fetch, tables
from perf.report.block import replaced

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[4] / "docs" / "capacity.md"
COST = Cost(
    definitions=100_000, look_cpu_seconds=0.01, look_octets=300, read_seconds=0.8, octets=200e6, build_seconds=0.7
)
FLEET = Fleet(100, 60.0, COST)


def drain(database: Sharing) -> dict[int, float]:
    """Replica → instant at which its job ended, in order."""
    ends = {}
    while math.isfinite(database.next()[0]):
        done, kind = database.next()
        database.advance(done)
        ends[database.finish(kind)] = done
    return ends


def test_a_single_job_takes_its_own_time() -> None:
    database = Sharing(cores=2, network=1e9, stream=1e8)
    database.add(Sharing.LOOK, 1, 0.5)
    database.add(Sharing.READING, 2, 3.0)
    assert drain(database) == {1: pytest.approx(0.5), 2: pytest.approx(3.0)}


def test_jobs_divide_the_cores_evenly() -> None:
    database = Sharing(cores=1, network=1e12, stream=1e8)
    database.add(Sharing.READING, 1, 1.0)
    database.add(Sharing.READING, 2, 2.0)
    # Both jobs run at half speed until the first is done, then the second one alone.
    assert drain(database) == {1: pytest.approx(2.0), 2: pytest.approx(3.0)}


def test_readings_divide_the_network_and_checks_are_not_affected() -> None:
    database = Sharing(cores=8, network=2e8, stream=2e8)
    for replica in range(4):
        database.add(Sharing.READING, replica, 1.0)
    database.add(Sharing.LOOK, 9, 0.5)
    ends = drain(database)
    assert ends.pop(9) == pytest.approx(0.5)
    assert list(ends.values()) == [pytest.approx(4.0)] * 4


def test_the_same_seed_gives_the_same_outcome() -> None:
    assert simulate(FLEET, changes=3) == simulate(FLEET, changes=3)
    assert simulate(FLEET, changes=3) != simulate(FLEET, changes=3, seed=1)


@given(
    replicas=st.integers(1, 60), interval=st.floats(0.5, 300), cores=st.integers(1, 8),
    network=st.floats(1e8, 1e10), together=st.booleans(),
)  # fmt: skip
def test_every_replica_gets_every_change_and_none_earlier_than_possible(
    replicas: int, interval: float, cores: int, network: float, together: bool
) -> None:
    fleet = Fleet(replicas, interval, COST, together=together, cores=cores, network=network)
    outcome = simulate(fleet, changes=2)
    assert len(outcome.staleness) == len(outcome.readings) == 2 * replicas
    assert outcome.staleness[0] >= COST.look_cpu_seconds + COST.read_seconds
    assert outcome.readings[0] >= COST.read_seconds * (1 - 1e-9)
    assert 1 <= outcome.at_once <= replicas
    # No work is lost or added: the last reading cannot end before the database could have finished all of them.
    least = replicas * max(COST.read_seconds / cores, COST.octets / network)
    assert outcome.staleness[-1] >= least * (1 - 1e-9)
    # A database that is never idle while there is work finishes one interval later at most.
    most = interval + least + replicas * COST.look_cpu_seconds + COST.read_seconds
    assert outcome.readings[-1] <= most


def test_a_single_replica_is_stale_during_wait_check_reading_and_publication() -> None:
    outcome = simulate(replace(FLEET, replicas=1), changes=400)
    own = COST.look_cpu_seconds + COST.read_seconds + COST.build_seconds
    assert outcome.percentile(0.5) == pytest.approx(30 + own, abs=3)
    assert outcome.staleness[-1] < 60 + own + 2
    assert outcome.readings[-1] == pytest.approx(COST.read_seconds)


def test_the_database_s_network_limits_a_fleet_that_reads_more_than_it_can_send() -> None:
    outcome = simulate(replace(FLEET, replicas=1000), changes=2)
    assert outcome.staleness[-1] == pytest.approx(1000 * 0.8 / 4 + 1000 * 0.01 / 4, rel=0.05)
    assert outcome.at_once > 900
    assert slowest_fetch(FLEET, outcome) == outcome.readings[-1] / 100


def test_replicas_in_step_read_together() -> None:
    apart, together = (simulate(replace(FLEET, together=each), changes=5) for each in (False, True))
    assert together.at_once > 10 * apart.at_once
    assert together.fan_out < apart.fan_out


def test_without_changes_each_replica_makes_one_check_in_an_interval() -> None:
    asked = rest(Fleet(1000, 10.0, COST))
    assert (asked.checks, asked.statements, asked.octets) == (100, 400, 30_000)
    assert asked.cores == pytest.approx(1.0)


def test_percentiles_are_values_of_the_outcome() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [at(values, share) for share in (0.01, 0.5, 0.95, 1.0)] == [1, 50, 95, 100]
    assert at([7.0], 0.5) == 7
    outcome = one_change(FLEET, random.Random(1))
    assert outcome.percentile(1.0) == outcome.staleness[-1]


@pytest.mark.parametrize("wrong", [{"replicas": 0}, {"interval": 0.0}, {"cores": 0}, {"network": 0.0}])
def test_an_impossible_fleet_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least one replica"):
        replace(FLEET, **wrong)


@pytest.mark.thorough  # six seconds of simulation
def test_the_page_holds_the_tables_of_the_simulation() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert replaced(page, BLOCK, f"{tables(*costs())}\n") == page, (
        "run `python -m perf simulate --docs docs/capacity.md`"
    )


def test_a_page_is_rewritten_between_its_markers_and_found_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulation, "tables", lambda *_: "| new |")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- simulation -->\nold\n<!-- /simulation -->\nafter\n", encoding="utf-8")
    arguments = ["--docs", str(page)]
    assert simulation.main([*arguments, "--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert simulation.main(arguments) == 0
    assert page.read_text(encoding="utf-8") == "before\n<!-- simulation -->\n| new |\n<!-- /simulation -->\nafter\n"
    assert simulation.main([*arguments, "--check"]) == 0
    page.write_text("no marks", encoding="utf-8")
    assert simulation.main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"no tables: {page}: needs the line <!-- simulation -->")
