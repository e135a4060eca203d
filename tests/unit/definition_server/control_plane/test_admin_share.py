"""A network's share of CPU time: which requests wait, for how long, and which networks are remembered."""

from __future__ import annotations

import pytest

from definition_server.control_plane import admin_share
from definition_server.control_plane.admin_share import BURST_SECONDS, SHARE, CpuShares


def test_a_network_may_use_its_burst_at_once_and_then_its_share() -> None:
    shares = CpuShares()
    shares.charge("a", BURST_SECONDS, 100.0)
    assert shares.wait("a", 100.0) == 0
    shares.charge("a", 0.1, 100.0)
    assert shares.wait("a", 100.0) == pytest.approx(0.1 / SHARE)
    assert shares.wait("a", 100.0 + 0.1 / SHARE) == pytest.approx(0)


def test_networks_do_not_wait_for_each_other() -> None:
    shares = CpuShares()
    shares.charge("a", 10 * BURST_SECONDS, 100.0)
    assert shares.wait("b", 100.0) == 0


def test_a_network_whose_use_has_drained_is_forgotten() -> None:
    shares = CpuShares()
    shares.charge("a", BURST_SECONDS, 100.0)
    shares.charge("a", BURST_SECONDS, 100.0 + BURST_SECONDS / SHARE)
    assert shares.wait("a", 100.0 + BURST_SECONDS / SHARE) == 0


def test_a_bounded_number_of_networks_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_share, "_NETWORKS", 3)
    shares = CpuShares()
    for name in "abcd":
        shares.charge(name, 10 * BURST_SECONDS, 100.0)
    assert [name for name in "abcd" if shares.wait(name, 100.0)] == ["b", "c", "d"]
