"""Freshness and the safety of a restart, judged from given facts."""

from __future__ import annotations

from typing import Any

import pytest

from definition_server.control_plane.freshness import RestartReason, Stale, restart_safety, staleness

FRESH: dict[str, Any] = {"serves": True, "held": False, "restored": False, "since_check": 1.0, "interval": 60.0}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"since_check": 120.0}, None),
        ({"since_check": 120.1}, Stale.CHECK_LATE),
        ({"since_check": None}, Stale.CHECK_LATE),
        ({"held": True}, Stale.CATALOGUE_HELD),
        ({"restored": True, "since_check": None}, Stale.RESTORED),
        ({"serves": False}, Stale.NOTHING_SERVED),
    ],
    ids=str,
)
def test_a_stale_catalogue_has_a_reason(changes: dict[str, Any], found: Stale | None) -> None:
    assert staleness(**FRESH | changes) is found


STORED: dict[str, Any] = {
    "serves": True,
    "stored": True,
    "pinned": False,
    "held": False,
    "rows_held": False,
    "database_reachable": True,
}


@pytest.mark.parametrize(
    ("changes", "safe", "reason"),
    [
        ({}, True, RestartReason.STORED),
        ({"pinned": True, "held": True, "rows_held": True, "database_reachable": False}, True, RestartReason.STORED),
        ({"stored": False}, True, RestartReason.DATABASE_REACHABLE),
        ({"stored": False, "database_reachable": False}, False, RestartReason.NO_SOURCE),
        ({"stored": False, "held": True}, False, RestartReason.HELD_NOT_STORED),
        ({"stored": False, "pinned": True}, False, RestartReason.PIN_NOT_STORED),
        ({"stored": False, "rows_held": True}, False, RestartReason.ROWS_HELD_NOT_STORED),
        ({"pin_lost": True}, False, RestartReason.PIN_NOT_STORED),
        ({"serves": False, "stored": False, "database_reachable": False}, True, RestartReason.NOTHING_SERVED),
    ],
    ids=str,
)
def test_a_restart_is_safe_if_it_would_serve_the_same_catalogue(
    changes: dict[str, Any], safe: bool, reason: RestartReason
) -> None:
    found = restart_safety(**STORED | changes)
    assert (found.safe, found.reason) == (safe, reason)
