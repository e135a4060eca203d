"""``perf/attacks.toml`` is read strictly. A time has two limits, its own and a multiple of the undisturbed victim's
time; the larger one applies.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from perf.attackers.job import Job
from perf.attackers.process import KINDS
from perf.benches.attack_list import FILE, STRETCH, VARIANTS, Limit, load

HEAD = "victim = ''\nseconds = 5.0\ncalm_seconds = 1.0\nsettle_seconds = 1.0\n"
ALWAYS = "[[limit]]\nfigure = 'workers_died'\nmost = 0\n"
ATTACK = "[[attack]]\nname = 'a'\ntitle = 'A'\nbefore = '1'\njob = { kind = 'idle' }\n"


def test_every_attack_has_a_kind_of_attackers_and_is_part_of_a_variant() -> None:
    plan = load()
    assert len({each.name for each in plan.attacks}) == len(plan.attacks)
    for attack in plan.attacks:
        assert Job(port=1, key="", name="", **attack.job).kind in KINDS
        assert set(attack.variants) | set(attack.short) <= set(VARIANTS)
        assert attack.variants


def test_every_kind_of_attackers_is_used() -> None:
    assert {attack.job["kind"] for attack in load().attacks} == KINDS.keys()


def test_the_short_measurement_makes_only_attacks_with_a_limit_on_counts() -> None:
    for attack in load().attacks:
        counts = [each for each in attack.limits if not each.figure.endswith("_ms")]
        assert not attack.short or len(counts) >= 5, attack.name


def test_memory_of_worker_and_master_has_the_limit_of_64_mb_after_every_attack() -> None:
    for attack in load().attacks:
        limits = {each.figure: each.most for each in attack.limits}
        assert limits["worker_after_mb"] == limits["master_after_mb"] == 64


@pytest.mark.parametrize(
    ("limit", "figures", "kept"),
    [
        (Limit("x", most=10), {"x": 10}, True),
        (Limit("x", most=10), {"x": 10.1}, False),
        (Limit("x", most=10), {}, False),
        (Limit("x", least=1), {"x": 0.99}, False),
        (Limit("x", least=1), {"x": 1}, True),
        (Limit("x", most=10, ratio=5), {"x": 14, "calm_x": 3}, True),
        (Limit("x", most=10, ratio=5), {"x": 16, "calm_x": 3}, False),
        (Limit("x", most=10, ratio=5), {"x": 9, "calm_x": 0.1}, True),
        (Limit("x", most=10, ratio=5), {"x": 11}, False),
        (Limit("x", most=10, stretched=True), {"x": 24, STRETCH: 2.5}, True),
        (Limit("x", most=10, stretched=True), {"x": 26, STRETCH: 2.5}, False),
        (Limit("x", most=10, stretched=True), {"x": 11}, False),
        (Limit("x", most=10), {"x": 24, STRETCH: 2.5}, False),
        (Limit("x", most=10, ratio=5, stretched=True), {"x": 34, "calm_x": 7, STRETCH: 2.5}, True),
    ],
    ids=[
        "at most",
        "above",
        "missing",
        "below",
        "at least",
        "calibrated",
        "above both",
        "below most",
        "without calm",
        "stretched",
        "above stretched",
        "no stretch",
        "not to be stretched",
        "calibrated above stretched",
    ],
)
def test_a_limit_is_judged_on_the_figures_of_the_run(limit: Limit, figures: dict[str, float], kept: bool) -> None:
    assert limit.kept(figures) is kept


@pytest.mark.parametrize(
    "text",
    [
        HEAD + ALWAYS + ATTACK + "unknown = 1\n",
        HEAD + ALWAYS + ATTACK + "action = 'wait'\n",
        HEAD + ALWAYS + ATTACK + "transports = ['native']\n",
        HEAD + ALWAYS + ATTACK + "limits = [{ figure = 'x' }]\n",
        HEAD + ALWAYS + ATTACK + "limits = [{ figure = 'x', least = 1, ratio = 2 }]\n",
        HEAD + "more = 1\n" + ALWAYS + ATTACK,
    ],
    ids=["unknown key", "unknown action", "no reason", "no limit", "ratio of least", "unknown key of the file"],
)
def test_a_mistake_in_the_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "attacks.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"."):
        load(file)


def test_a_transport_on_which_limits_are_not_judged_has_a_reason() -> None:
    assert FILE.exists()
    for attack in load().attacks:
        assert ("grpcio" in attack.transports) != bool(attack.why_not)
        assert "native" in attack.transports


def test_an_attack_of_the_usual_duration_is_shorter_in_the_short_measurement() -> None:
    attacks = {each.name: each for each in load().attacks}
    assert attacks["garbage"].duration(5.0, short=True) < 5.0
    assert attacks["garbage"].duration(5.0, short=False) == 5.0
    assert attacks["ended-watches"].duration(5.0, short=True) == attacks["ended-watches"].seconds
