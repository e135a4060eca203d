"""`Limits` checks the range of each limit, and the relations between limits."""

from __future__ import annotations

from dataclasses import fields
from math import inf, nan

import pytest
from tests.support.h2_peer import Peer
from tests.support.h2_wire import WINDOW_UPDATE

from grpc_h2 import Limits


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"initial_window": 2**20 + 1}, ("initial_window (1048577)", "connection_window (1048576)", "lower", "raise")),
        ({"connection_window": 65_534}, ("connection_window is 65534", "65535 or more")),
        ({"connection_window": 2**31}, ("connection_window", "2147483647")),
        ({"initial_window": 0}, ("initial_window is 0", "1 or more")),
        ({"max_message": 5 * 2**20}, ("max_buffered", "max_message", "twice")),
        ({"max_unread": 1000}, ("max_message", "max_unread")),
        ({"low_water": 2**20}, ("low_water", "high_water")),
        ({"max_header_list": 2**20}, ("hard_header_list", "max_header_block")),
        ({"max_header_fields": 1000}, ("max_header_fields (1000)", "hard_header_fields (128)")),
        ({"body_timeout": 0.5}, ("drain_body_timeout", "body_timeout")),
        ({"age_jitter": 1.5}, ("age_jitter", "0 to 1")),
        ({"max_concurrent_streams": 0}, ("max_concurrent_streams is 0", "1 or more")),
        ({"min_read_rate": 0}, ("min_read_rate is 0",)),
        ({"stall_timeout": -1.0}, ("stall_timeout is -1.0",)),
        ({"keepalive_time": nan}, ("keepalive_time is nan",)),
        ({"glitches": True}, ("glitches is True",)),
        ({"max_message": "4 MiB"}, ("max_message is '4 MiB'",)),
    ],
)  # fmt: skip
def test_limits_that_contradict_each_other_are_refused_with_names_and_remedy(wrong: dict, named: tuple[str, ...]):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the text is checked below
        Limits(**wrong)
    for part in named:
        assert part in str(refusal.value)


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_no_limit_may_be_negative(name: str):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        Limits(**{name: -1})


def test_every_problem_is_reported_at_once():
    with pytest.raises(ValueError, match=r"glitches is 0.*stall_timeout is -1"):
        Limits(glitches=0, stall_timeout=-1)


def test_times_may_be_infinite():
    assert Limits(keepalive_time=inf, max_connection_idle=inf).keepalive_time == inf


def test_the_smallest_window_of_a_connection_needs_no_window_update():
    peer = Peer(limits=Limits(initial_window=65_535, connection_window=65_535))
    assert not [frame for frame in peer.replies.frames if frame.kind == WINDOW_UPDATE]
    peer.assert_alive()


def test_the_size_of_a_request_s_header_list_is_limited_as_documented() -> None:
    limits = Limits()
    assert (limits.max_header_fields, limits.max_header_list) == (100, 16_384)
    assert (limits.hard_header_fields, limits.hard_header_list) == (128, 131_072)
