"""`Limits` checks its values: each limit has a range, and some limits depend on others. This module also states the
limits of a connection; other tests import them, so they would accept any value.
"""

from __future__ import annotations

from dataclasses import fields
from math import inf, nan

import pytest
from tests.support.h2_peer import Peer
from tests.support.h2_wire import WINDOW_UPDATE
from tests.support.stated import deviations

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


KIB, MIB = 1024, 1024 * 1024

STATED: dict[str, dict[str, object]] = {
    "abuse": {
        "FRAME_WORK": 4,
        "BLOCK_WORK": 3,
        "STREAM_WORK": 12,
        "OCTETS_OF_BLOCK_PER_WORK": 8,
        "OCTETS_OF_MESSAGE_PER_WORK": 256,
        "_FORGIVEN": 1.25,
        "_LATE_GLITCH": 0.25,
        "_UPDATES_PER_STREAM": 2,
        "_UPDATES_PER_FRAME": 20,
        "LeakyBucket.add(amount)": 1.0,
        "Abuse.glitch(amount)": 1.0,
    },
    "bodies": {
        "MESSAGE_OVERHEAD": 128,
        "_TINY": 64,
        "_TINY_GLITCH": 0.02,
        "_BOMB_GLITCH": 10.0,
        "_SUSPICIOUS_RATIO": 100,
    },
    "budget": {"_CLASSES": 64, "_COMPARED": 256},
    "calls": {"_REFUSED_AT_ONCE": 8, "Calls.open(end_stream)": False},
    "closing": {"Closing.rest_received(octets)": 0, "Closing.abandon(by_handler)": False},
    "connection": {
        "_WAITING_WEIGHT": 512,
        "Connection.__init__(jitter)": 0.0,
        "Connection.pause_writing(written)": 0,
        "Connection.send_message(compressed)": False,
    },
    "deadlines": {"_MARKS": 8, "ENDED_AT_ONCE": 8, "_RESTS": 256, "_REST_OCTETS": 64 * KIB},
    "fast_path": {"_LAST_ID": 2_147_418_111, "Opened.window": 0},
    "headers": {
        "_MEMO_ENTRIES": 64,
        "FIELDS_AT_ONCE": 32,
        "_ORDINARY_BLOCKS": 8,
        "_BLOCK_WEIGHT": 1024,
        "_BLOCK_FACTOR": 4,
        "_OVERFLOW_GLITCH": 5.0,
    },
    "inbound": {"_STREAMS_PER_GLITCH": 64},
    "limits": {
        "BACKLOG": 4 * KIB,
        "_LEAST": {
            "max_concurrent_streams": 1,
            "initial_window": 1,
            "connection_window": 65_535,
            "max_header_list": 256,
            "max_header_fields": 8,
            "max_header_block": 16 * KIB,
            "glitches": 1,
            "calls_per_turn": 1,
            "answers_per_turn": 1,
            "work_per_turn": 1,
            "octets_per_turn": 1,
            "replies_per_turn": 1,
            "min_read_rate": 1,
            "max_held": 64 * KIB,
            "max_held_by_strangers": 64 * KIB,
        },
        "Limits.max_concurrent_streams": 256,
        "Limits.initial_window": 256 * KIB,
        "Limits.connection_window": MIB,
        "Limits.max_buffered": 8 * MIB,
        "Limits.max_unread": 16 * MIB,
        "Limits.max_message": 4 * MIB,
        "Limits.body_timeout": 10.0,
        "Limits.drain_body_timeout": 1.0,
        "Limits.rest_timeout": 1.0,
        "Limits.max_header_list": 16 * KIB,
        "Limits.max_header_fields": 100,
        "Limits.hard_header_list": 128 * KIB,
        "Limits.hard_header_fields": 128,
        "Limits.max_continuations": 8,
        "Limits.max_header_block": 64 * KIB,
        "Limits.max_settings_entries": 32,
        "Limits.glitches": 1000,
        "Limits.glitches_per_second": 200.0,
        "Limits.free_window_updates": 5,
        "Limits.calls_per_turn": 32,
        "Limits.answers_per_turn": 64,
        "Limits.work_per_turn": 60,
        "Limits.octets_per_turn": 256 * KIB,
        "Limits.late_frames_per_stream": 4,
        "Limits.replies_per_turn": 1000,
        "Limits.high_water": 64 * KIB,
        "Limits.low_water": 16 * KIB,
        "Limits.preface_timeout": 10.0,
        "Limits.header_timeout": 10.0,
        "Limits.stall_timeout": 60.0,
        "Limits.read_grace": 30.0,
        "Limits.min_read_rate": 32768.0,
        "Limits.max_read_time": 600.0,
        "Limits.keepalive_time": 7200.0,
        "Limits.keepalive_timeout": 20.0,
        "Limits.min_ping_interval": 10.0,
        "Limits.max_ping_strikes": 2,
        "Limits.age_jitter": 0.1,
        "Limits.drain_timeout": 1.0,
        "Limits.max_held": 64 * MIB,
        "Limits.max_held_by_strangers": 32 * MIB,
    },
    "outbound": {"_QUANTUM": 64 * KIB, "_LARGEST_FRAME": 64 * KIB, "_COPIED": 4 * KIB},
    "stream": {"STREAM_WEIGHT": 4 * KIB},
    "streams": {"_REMEMBERED_RESETS": 1024, "_REMEMBERED_GAPS": 64},
}
"""Module → name → value. Each was chosen for a reason, which its module gives. A change of one is made here too."""


def test_the_numbers_of_each_module_equal_the_stated_ones() -> None:
    assert deviations("grpc_h2.connection", STATED) == []
