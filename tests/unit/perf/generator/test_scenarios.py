"""Scenarios as data."""

from __future__ import annotations

from pathlib import Path

import pytest
from perf.generator.scenarios import (
    COMPILED,
    CONTRACT,
    PURE,
    SERVERS,
    SETS,
    WORKERS,
    YARDSTICKS,
    ScenarioError,
    chosen,
    load,
)
from perf.peers import NAMES

LEAST = '[[scenario]]\nname = "a"\ntitle = "t"\nwhy = "w"\nkind = "closed"\n'
PROMISED = (
    "get-hot", "get-zipf", "get-missing", "auth-flood", "deadlines", "few-connections-2", "few-connections-4",
    "few-connections-8", "few-connections-16", "many-connections", "idle-connections-1000", "idle-connections-10000",
    "sync-small", "sync-200MB", "publish-under-load", "tls", "slow-reader", "rated", "saturate", "upstream-stress",
)  # fmt: skip


def refused(folder: Path, text: str) -> str:
    """Why a file with ``text`` is refused."""
    file = folder / "scenarios.toml"
    file.write_text(text)
    with pytest.raises(ScenarioError) as caught:
        load(file)
    return str(caught.value)


def test_every_required_scenario_exists_and_states_its_reason() -> None:
    found = load()
    assert set(PROMISED) <= set(found)
    assert all(each.why and each.title for each in found.values())


def test_a_scenario_of_a_smaller_set_is_in_every_larger_set_too() -> None:
    for each in load().values():
        assert each.sets == SETS[-len(each.sets) :], f"{each.name} is in {each.sets}"


def test_upstream_stress_has_the_profile_of_the_certificate() -> None:
    stress = load()["upstream-stress"]
    assert (stress.connections * stress.streams, stress.known, stress.unknown) == (500, 0.8, 0.2)


def test_each_makes_one_scenario_for_every_value(tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text(LEAST + "each = { connections = [2, 16] }\n")
    found = load(file)
    assert {name: each.connections for name, each in found.items()} == {"a-2": 2, "a-16": 16}
    assert found["a-2"].servers == CONTRACT


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("conections = 4\n", "unknown key conections; known are"),
        ('kind = "endless"\n', "kind = 'endless' is not one of closed, open"),
        ('names = "some"\n', "names = 'some' is not one of one, all, zipf"),
        ('servers = ["apache"]\n', "servers = 'apache' is not one of native, compiled, grpcio"),
        ('servers = "native"\n', "servers takes a list of names"),
        ('sets = ["nightly"]\n', "sets = 'nightly' is not one of quick, standard, full"),
        ("connections = 0\n", "connections = 0, but it must be at least 1"),
        ('seconds = "long"\n', "seconds = 'long', but it must be at least 0.1"),
        ('rate = "fast"\n', "rate = 'fast', but it must be a number or 'saturate'"),
        ('kind = "open"\n', "an open loop needs a rate"),
        ('kind = "publish"\nrate = 5\n', "kind publish needs a rate and publications"),
        ("unknown = 0.8\nbad_key = 0.3\n", "unknown and bad_key together exceed 1"),
        ("each = { connections = [1], streams = [1] }\n", "each takes one key with a list of values"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_its_reason(tmp_path: Path, more: str, told: str) -> None:
    kind = "" if "kind" in more else 'kind = "closed"\n'
    reason = refused(tmp_path, LEAST.replace('kind = "closed"\n', kind) + more)
    assert "scenario a: " in reason
    assert told in reason


def test_a_file_without_valid_scenarios_is_refused_with_its_reason(tmp_path: Path) -> None:
    assert "scenarios.toml: " in refused(tmp_path, "[[scenario")
    assert "only [[scenario]] tables" in refused(tmp_path, "[gate]\n")
    assert "title, why, kind is missing" in refused(tmp_path, '[[scenario]]\nname = "a"\n')
    assert "is defined twice" in refused(tmp_path, LEAST + LEAST)


def test_only_selects_scenarios_from_all_sets() -> None:
    found = load()
    assert [each.name for each in chosen(found, "quick", ["few"])] == [name for name in found if "few" in name]
    assert {each.name for each in chosen(found, "quick")} < {each.name for each in chosen(found, "standard")}
    with pytest.raises(ScenarioError, match="no scenario is called cold; there are get-hot"):
        chosen(found, "quick", ["cold"])


def test_the_list_of_servers_holds_every_peer() -> None:
    assert (*WORKERS, *NAMES) == SERVERS
    assert (*CONTRACT, *YARDSTICKS) == SERVERS


def test_both_forms_of_the_engine_take_part_in_the_same_scenarios() -> None:
    found = [each for each in load().values() if PURE in each.servers or COMPILED in each.servers]
    assert found
    assert [each.name for each in found if {PURE, COMPILED} - {*each.servers}] == []
