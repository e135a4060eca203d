"""Which calls carry a known key, which keys are reported as used, and when remembered decisions are dropped."""

from __future__ import annotations

from hashlib import sha256

import pytest

from definition_server.api_keys import METADATA_KEY
from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.failure import CallFailed, Status


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def ring(*keys: str) -> KeyRing:
    return KeyRing(digest(key) for key in keys)


def accepted(keys: KeyRing, *presented: str | bytes) -> bool:
    try:
        keys.authenticate([("other", "x"), *((METADATA_KEY, each) for each in presented)])
    except CallFailed as failure:
        return (failure.status, failure.message) != (Status.UNAUTHENTICATED, "Invalid Credentials")
    return True


def test_only_known_keys_are_accepted() -> None:
    keys = ring("old", "new")
    assert accepted(keys, "old")
    assert accepted(keys, b"new")
    for presented in ((), ("other",), ("",), ("old ",), ("old", "new"), ("new", "new"), (digest("old"),)):
        assert not accepted(keys, *presented)


def test_no_key_is_accepted_before_the_first_are_known() -> None:
    assert not accepted(KeyRing(), "key")


def test_used_keys_are_reported_once_and_refused_keys_are_not() -> None:
    keys = ring("a", "b", "c")
    assert keys.take_used() == ()
    for key in ("b", "wrong", "b", "a"):
        accepted(keys, key)
    assert keys.take_used() == (digest("a"), digest("b"))
    assert keys.take_used() == ()


def test_a_use_before_a_rotation_is_not_reported_as_that_of_another_key() -> None:
    keys = ring("a", "b")
    accepted(keys, "a")
    keys.replace([digest("b"), digest("c")])
    assert keys.take_used() == ()


@pytest.mark.parametrize("act", ["replace", "authorize_again"])
def test_listeners_drop_remembered_decisions_when_keys_change(act: str) -> None:
    keys, calls = ring("a"), []
    keys.on_change(lambda: calls.append(accepted(keys, "a")))
    if act == "replace":
        keys.replace([digest("b")])
    else:
        keys.authorize_again()
    assert calls == [act != "replace"]  # the new keys are known by then


def test_every_known_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("definition_server.data_plane.authentication.hmac.compare_digest", compare)
    keys = ring("a", "b", "c")
    for key in ("a", "b", "c", "none"):
        compared.clear()
        accepted(keys, key)
        assert len(compared) == 3
