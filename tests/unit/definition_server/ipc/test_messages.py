"""What a message holds where its sender says nothing of it, and which reports of calls are plausible."""

from __future__ import annotations

import socket
import sys
from dataclasses import MISSING, fields

import pytest

from definition_server.ipc import channel
from definition_server.ipc.messages import CallsSampled, Configure
from definition_server.ipc.stats import METHODS, STATUSES


def test_without_a_word_of_the_master_a_worker_has_no_limits_no_jail_and_reports_no_calls() -> None:
    defaults = {each.name: each.default for each in fields(Configure) if each.default is not MISSING}
    assert defaults == {
        "max_connections": 0, "max_connections_per_peer": 0, "max_connection_idle_seconds": 0.0,
        "keepalive_time_seconds": 7200.0, "keepalive_timeout_seconds": 20.0, "keepalive_min_time_seconds": 10.0,
        "jail": "off", "version_metadata": True, "trace_one_call_in": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("calls", "plausible"),
    [
        (CallsSampled((), (), (), ()), True),
        (CallsSampled((len(METHODS) - 1,), (len(STATUSES) - 1,), (7,), (7,)), True),
        (CallsSampled((len(METHODS),), (0,), (7,), (7,)), False),
        (CallsSampled((0,), (len(STATUSES),), (7,), (7,)), False),
        (CallsSampled((0,), (0,), (7,), (8,)), False),
        (CallsSampled((0, 0), (0, 0), (7, 7), (7, 8)), False),
        (CallsSampled((0, 0), (0,), (7,), (7,)), False),
        (CallsSampled((0,), (0, 0), (7,), (7,)), False),
        (CallsSampled((0,), (0,), (7, 7), (7,)), False),
        (CallsSampled((0,), (0,), (7,), (7, 7)), False),
    ],
    ids=["none", "the last of each", "method", "status", "time", "second time", "1", "2", "3", "4"],
)
def test_a_report_of_calls_is_plausible_where_its_lists_agree_and_its_indices_exist(
    calls: CallsSampled, plausible: bool
) -> None:
    assert calls.plausible is plausible


def test_a_descriptor_that_came_in_part_is_none() -> None:
    whole = b"".join(number.to_bytes(4, sys.byteorder) for number in (7, 8))
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    assert channel._descriptors([(*rights, whole)]) == (7, 8)
    for extra in (1, 2, 3):
        assert channel._descriptors([(*rights, whole + b"\0" * extra)]) == (7, 8)
    assert channel._descriptors([(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, whole)]) == ()
