"""The time of the last use of each key, from the reports of workers, which the master does not trust."""

from __future__ import annotations

from hashlib import sha256

from definition_server.control_plane.key_usage import KeyUsage


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def test_a_key_that_was_not_presented_has_the_time_zero() -> None:
    usage = KeyUsage({"old": "1", "new": "2"}, clock=lambda: 100.0)
    assert usage.last_used() == {"old": 0.0, "new": 0.0}
    usage.used([digest("2")])
    assert usage.last_used() == {"old": 0.0, "new": 100.0}


def test_workers_are_sent_digests_and_no_key() -> None:
    assert KeyUsage({"a": "secret"}).message.digests == (digest("secret"),)


def test_digests_that_were_never_sent_are_ignored() -> None:
    usage = KeyUsage({"a": "1"}, clock=lambda: 100.0)
    usage.used([digest("other"), "no digest", ""])
    assert usage.last_used() == {"a": 0.0}


def test_a_rotation_keeps_the_times_of_keys_that_stay_and_forgets_the_others() -> None:
    usage = KeyUsage({"a": "1", "b": "2"}, clock=lambda: 100.0)
    usage.used([digest("1"), digest("2")])
    usage.replace({"renamed": "1", "c": "3"})
    assert usage.last_used() == {"renamed": 100.0, "c": 0.0}
    usage.replace({"b": "2"})
    assert usage.last_used() == {"b": 0.0}
