"""The policy file: its declarations, and the policy that remains in effect if the file cannot be used."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.support.logs import captured_logs

from definition_server.control_plane.publication_policy import PolicyUnusable, PublicationPolicy, parse
from definition_server.control_plane.wishes import Pin, Policy

pytestmark = pytest.mark.usefixtures("nothing_is_left")

HASH = "3f9a0c12" * 8
OTHER = "0123456789abcdef"
GOOD = f'accept = ["{HASH}", "{OTHER}"]\n[pin]\nversion = "{HASH[:8].upper()}"\nuntil = 2026-12-01T00:00:00Z\n'
PINNED = Pin(HASH[:8], datetime(2026, 12, 1, tzinfo=UTC).timestamp(), "policy")


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        pytest.param("", Policy(), id="empty"),
        pytest.param("# nothing\n", Policy(), id="comment"),
        pytest.param(GOOD, Policy((HASH, OTHER), PINNED), id="whole"),
        pytest.param("\ufeff" + GOOD, Policy((HASH, OTHER), PINNED), id="byte order mark"),
        pytest.param(f'[pin]\nversion = "{HASH}"', Policy((), Pin(HASH, None, "policy")), id="no end"),
        pytest.param(f'pin = {{ version = "{HASH}" }}', Policy((), Pin(HASH, None, "policy")), id="inline"),
    ],
)
def test_pin_and_accepted_hashes_are_read_from_the_file(text: str, policy: Policy) -> None:
    assert parse(text.encode()) == policy


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(b"accept = [", "not TOML", id="cut off"),
        pytest.param(b"\xff", "UTF-8", id="no UTF-8"),
        pytest.param(b"a = " + b"[" * 5000, "nested|TOML", id="nested"),
        pytest.param(b"acept = []", "unknown: acept", id="misspelled"),
        pytest.param(b"version = 2\naccept = []", "unknown: version", id="of another version"),
        pytest.param(b'[pin]\nversion = "3f9a0c12"\nuntill = 1', "unknown: pin.untill", id="misspelled in pin"),
        pytest.param(b"[pin]\n", "pin.version is missing", id="pin of nothing"),
        pytest.param(b'accept = "3f9a0c12"', "list", id="no list"),
        pytest.param(b'accept = ["3f9a0c1"]', "8 to 64", id="short"),
        pytest.param(b"accept = [12345678]", "8 to 64", id="a number"),
        pytest.param(b'accept = ["zzzzzzzz"]', "8 to 64", id="no hex"),
        pytest.param(b'pin = "3f9a0c12"', "table", id="no table"),
        pytest.param(b'[pin]\nversion = "3f9a0c12"\nuntil = 2026-12-01T00:00:00', "time zone", id="local time"),
        pytest.param(b'[pin]\nversion = "3f9a0c12"\nuntil = 2026-12-01', "time zone", id="date"),
        pytest.param(b'[pin]\nversion = "3f9a0c12"\nuntil = "2026-12-01T00:00:00Z"', "without quotes", id="text"),
        pytest.param(
            b'[pin]\nversion = "3f9a0c12"\nuntil = 9999-12-31T23:59:59-23:59', "after the year 9999", id="year 10000"
        ),
        pytest.param(b"a" + b".a" * 60_000 + b" = 1", "line 1", id="a key of many parts"),
        pytest.param(b"# \n[" + b"a." * 60_000 + b"a]", "line 2", id="a table of many parts"),
        pytest.param(b"pin = 1979-13-40", "not TOML", id="no date"),
    ],
)
def test_an_unusable_content_is_refused_with_a_reason(content: bytes, problem: str) -> None:
    with pytest.raises(PolicyUnusable, match=problem):
        parse(content)


class Watched:
    def __init__(self, path: Path) -> None:
        self.found: list[Policy] = []
        self.policy = PublicationPolicy(path, lambda: self.found.append(self.policy.current))

    async def read_twice(self) -> None:
        await self.policy.read()
        await self.policy.read()


async def test_new_content_takes_effect_after_it_was_read_twice(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD)
    watched = Watched(path)
    await watched.policy.read(at_once=True)
    assert watched.found == [parse(GOOD.encode())]
    path.write_text("")  # an editor that has not written everything yet
    await watched.policy.read()
    path.write_text(GOOD)
    await watched.read_twice()
    assert len(watched.found) == 1
    path.write_text("accept = []")
    await watched.read_twice()
    assert watched.found[1:] == [Policy()]


async def test_a_symbolic_link_that_is_swapped_as_by_kubernetes_is_noticed(tmp_path: Path) -> None:
    for number, text in enumerate(("", GOOD)):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "policy.toml").write_text(text)
        os.utime(tmp_path / f"..{number}" / "policy.toml", (1, 1))  # the times of the file are not used
    (tmp_path / "..data").symlink_to("..0")
    (tmp_path / "policy.toml").symlink_to("..data/policy.toml")
    watched = Watched(tmp_path / "policy.toml")
    await watched.policy.read(at_once=True)
    (tmp_path / "..new").symlink_to("..1")
    (tmp_path / "..new").replace(tmp_path / "..data")
    await watched.read_twice()
    assert watched.found == [Policy(), parse(GOOD.encode())]


@pytest.mark.parametrize("damage", ["cut off", "gone", "directory", "fifo", "too large"])
async def test_an_unusable_policy_keeps_the_old_policy_and_logs_one_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD)
    watched = Watched(path)
    await watched.policy.read(at_once=True)
    path.unlink()
    if damage == "cut off":
        path.write_text(GOOD[:-5])
    elif damage == "directory":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage == "too large":
        path.write_text("#" * 300_000)
    with captured_logs() as lines:
        await watched.read_twice()
        await watched.read_twice()
    assert [line["event"] for line in lines] == ["Publication policy not usable; the previous one stays"]
    assert watched.policy.problem is not None
    assert len(watched.found) == 1
    if damage in ("directory",):
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_text(GOOD)
    await watched.read_twice()
    assert watched.policy.problem is None
    assert len(watched.found) == 2


@pytest.mark.parametrize("lacking", [1, 2], ids=["to read the file", "to parse it"])
async def test_the_policy_is_kept_if_no_thread_can_start_and_the_file_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: int
) -> None:
    """Other processes of the account, or of the container, have used up its limit of processes."""
    path = tmp_path / "policy.toml"
    path.write_text("")
    watched = Watched(path)
    await watched.policy.read(at_once=True)
    path.write_text(GOOD)
    await watched.policy.read()
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) >= lacking:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        for _ in range(3):
            await watched.policy.read()
        assert len(started) >= lacking
        assert watched.policy.current == Policy()
        assert "no thread can be started: can't start new thread" in (watched.policy.problem or "")
    await watched.read_twice()
    assert watched.policy.current == parse(GOOD.encode())
    assert watched.policy.problem is None


async def test_a_policy_is_reported_each_time_it_becomes_writable_by_every_user(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD)
    watched = Watched(path)
    for mode, warnings in ((0o664, 0), (0o666, 1), (0o644, 0), (0o602, 1)):
        path.chmod(mode)
        with captured_logs() as lines:
            for _ in range(3):
                await watched.policy.read()
        found = [line["event"] for line in lines if line["log_level"] == "warning"]
        assert found == ["Every user may write the publication policy"] * warnings
    assert watched.policy.current == parse(GOOD.encode())


@pytest.mark.parametrize(
    ("text", "accept", "pin", "until"),
    [
        ('accept = ["3f9a0c12"]', ["3f9a0c12"], None, None),
        ('[pin]\nversion = "3f9a0c12"', [], "3f9a0c12", None),
        ('[pin]\nversion = "3f9a0c12"\nuntil = 2026-12-01T00:00:00Z', [], "3f9a0c12", "2026-12-01T00:00:00+00:00"),
    ],
)
async def test_a_policy_that_was_read_is_logged_with_what_it_declares(
    tmp_path: Path, text: str, accept: list[str], pin: str | None, until: str | None
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with captured_logs() as lines:
        await Watched(path).policy.read(at_once=True)
    assert lines == [{"event": "Publication policy read", "log_level": "info", "path": str(path), "accept": accept,
                      "pin": pin, "until": until}]  # fmt: skip


@pytest.mark.parametrize(("length", "shown"), [(80, 80), (81, 80), (5000, 80)])
def test_a_value_that_cannot_be_used_is_shown_up_to_eighty_characters(length: int, shown: int) -> None:
    with pytest.raises(PolicyUnusable, match=f"^accept: '{'z' * shown}' is not"):
        parse(f'accept = ["{"z" * length}"]'.encode())
