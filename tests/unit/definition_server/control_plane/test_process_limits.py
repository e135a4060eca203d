"""Limits of the process are raised where that is allowed; one that is low is logged, or ends the start."""

from __future__ import annotations

import resource

import pytest
from tests.support.logs import LogLines, logged

from definition_server.control_plane import process_limits
from definition_server.control_plane.process_limits import raise_process_limits

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """Soft and hard limits of a process that is not this one, by number; at first there are none."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    values = dict.fromkeys((resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS), unlimited)
    monkeypatch.setattr(process_limits.resource, "getrlimit", values.__getitem__)
    monkeypatch.setattr(process_limits.resource, "setrlimit", values.__setitem__)
    return values


@pytest.mark.parametrize("number", [resource.RLIMIT_FSIZE, resource.RLIMIT_AS])
def test_a_limit_below_four_gib_is_logged_and_one_of_four_gib_is_not(
    limits: dict[int, tuple[int, int]], number: int, logs: LogLines
) -> None:
    limits[number] = (4 * GIB, 4 * GIB)
    assert raise_process_limits() is None
    assert not logged(logs, "A limit of the process is low")
    limits[number] = (4 * GIB - 1, 4 * GIB - 1)
    assert raise_process_limits() is None
    (line,) = logged(logs, "A limit of the process is low")
    assert line["limit"] == 4 * GIB - 1


def test_a_soft_limit_is_raised_to_the_hard_one(limits: dict[int, tuple[int, int]], logs: LogLines) -> None:
    limits[resource.RLIMIT_CPU] = (10, resource.RLIM_INFINITY)
    assert raise_process_limits() is None
    assert limits[resource.RLIMIT_CPU] == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert not logged(logs, "A limit of the process is low")


def test_files_of_less_than_one_mib_end_the_start(limits: dict[int, tuple[int, int]]) -> None:
    limits[resource.RLIMIT_FSIZE] = (MIB - 1, MIB - 1)
    assert "1048576 are needed" in (raise_process_limits() or "")
    limits[resource.RLIMIT_FSIZE] = (MIB, MIB)
    assert raise_process_limits() is None
