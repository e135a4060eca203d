"""The history keeps the last catalogues, skips and names files that are damaged or of another user, and removes the
oldest."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from tests.support.fakes import FakeClock
from tests.support.snapshots import published, row

from definition_server.catalog.layout import FOOTER_SIZE, MAGIC
from definition_server.catalog.signing import Signer
from definition_server.control_plane.history import History
from definition_server.control_plane.store import NotOurs, StoreError

KEY = Signer("key")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def history(tmp_path: Path, clock: FakeClock) -> History:
    return History(tmp_path, 3, clock)


def keep(history: History, code: str, clock: FakeClock, *spare: str, signer: Signer | None = None) -> str:
    """Keep a catalogue with ``code``, a second after the previous one. Returns its version."""
    clock.advance(1)
    publication = published(row("if", code), created_at=clock.now - 100, signer=signer)
    try:
        history.add(publication.descriptor, publication.snapshot.version_hash, signer, spare)
    finally:
        os.close(publication.descriptor)
    return publication.snapshot.version_hash


def versions(history: History) -> list[str]:
    return [entry.version_hash for entry in history.entries()]


def path_of(history: History, version: str) -> Path:
    return history.directory / f"{version}.avapsnap"


def test_without_a_directory_the_history_is_empty(history: History) -> None:
    assert history.entries() == []
    assert history.load("ab" * 32, None) is None


def test_kept_catalogues_are_listed_newest_first_and_loaded_whole(history: History, clock: FakeClock) -> None:
    first, second = keep(history, "1", clock), keep(history, "2", clock)
    entries = history.entries()
    assert [entry.version_hash for entry in entries] == [second, first]
    assert (entries[0].definitions, entries[0].published_at) == (1, clock.now)
    assert entries[0].created_at == clock.now - 100
    loaded = history.load(first, None)
    assert loaded is not None
    os.close(loaded[1])
    definition = loaded[0].get("if")
    assert definition is not None
    assert definition.code == b"1"
    assert path_of(history, first).stat().st_mode & 0o777 == 0o600


def test_the_oldest_catalogues_are_removed_except_those_to_spare(history: History, clock: FakeClock) -> None:
    first, second = keep(history, "1", clock), keep(history, "2", clock)
    kept = [keep(history, str(number), clock, first) for number in range(3, 7)]
    assert versions(history) == [*reversed(kept[1:]), first]
    assert second not in versions(history)


def test_a_catalogue_that_is_published_again_is_the_newest_and_kept_once(history: History, clock: FakeClock) -> None:
    first, second = keep(history, "1", clock), keep(history, "2", clock)
    assert keep(history, "1", clock) == first
    assert versions(history) == [first, second]


def test_a_history_of_zero_catalogues_keeps_nothing(tmp_path: Path, clock: FakeClock) -> None:
    history = History(tmp_path, 0, clock)
    keep(history, "1", clock)
    assert list(tmp_path.iterdir()) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_footer(path: Path) -> None:
    octets = bytearray(path.read_bytes())
    octets[-50] ^= 1
    path.write_bytes(octets)


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_link(path: Path) -> None:
    target = path.with_name("target")
    path.rename(target)
    path.symlink_to(target)


def change_format(path: Path) -> None:
    """An undamaged file of a later release."""
    octets = bytearray(path.read_bytes())
    fields = slice(len(octets) - FOOTER_SIZE, len(octets) - 32)
    octets[fields.start + len(MAGIC)] += 1
    octets[-32:] = hashlib.sha256(octets[fields]).digest()
    path.write_bytes(octets)


FAULTS = {
    "another version of the format": change_format,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncate,
    "footer": flip_footer,
    "no snapshot": lambda path: path.write_bytes(b"x" * 5000),
    "writable by others": lambda path: path.chmod(0o666),
    "fifo": make_fifo,
    "link": make_link,
    "directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_damaged_or_foreign_file_is_skipped_and_named_and_the_others_stay(
    history: History, clock: FakeClock, fault: object
) -> None:
    good, bad = keep(history, "1", clock), keep(history, "2", clock)
    fault(path_of(history, bad))
    assert versions(history) == [good]
    (problem,) = history.take_problems()
    assert str(path_of(history, bad)) in problem
    assert history.take_problems() == []
    with pytest.raises(StoreError):
        history.load(bad, None)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_catalogue_that_is_published_again_replaces_its_damaged_or_foreign_file(
    history: History, clock: FakeClock, fault: object
) -> None:
    version = keep(history, "1", clock)
    fault(path_of(history, version))
    assert keep(history, "1", clock) == version
    assert versions(history) == [version]
    assert history.take_problems() == []


def test_a_file_of_another_format_version_is_reported_with_that_version(history: History, clock: FakeClock) -> None:
    version = keep(history, "1", clock)
    change_format(path_of(history, version))
    assert versions(history) == []
    assert "version 2 found, this program reads version 1" in history.take_problems()[0]
    with pytest.raises(StoreError, match="version 2 found"):
        history.load(version, None)
    keep(history, "2", clock)
    assert path_of(history, version).exists(), "the release that wrote it can still use it"


def test_files_of_another_user_are_neither_listed_nor_loaded(
    history: History, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = keep(history, "1", clock, signer=KEY)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert versions(history) == []
    assert "12345" in history.take_problems()[0]
    with pytest.raises(NotOurs, match="the server runs as 12345"):
        history.load(version, KEY)


def test_a_damaged_body_is_found_when_it_is_loaded(history: History, clock: FakeClock) -> None:
    version = keep(history, "1", clock)
    path = path_of(history, version)
    octets = bytearray(path.read_bytes())
    octets[10] ^= 1
    path.write_bytes(octets)
    with pytest.raises(StoreError, match="content checksum"):
        history.load(version, None)


def test_a_file_under_the_name_of_another_version_is_not_used(history: History, clock: FakeClock) -> None:
    version = keep(history, "1", clock)
    other = "ab" * 32
    path_of(history, version).rename(path_of(history, other))
    assert versions(history) == []
    assert version in history.take_problems()[0]
    with pytest.raises(StoreError, match=version):
        history.load(other, None)


@pytest.mark.parametrize("signer", [None, Signer("another key")], ids=["not signed", "another key"])
def test_with_a_key_only_a_file_with_our_mac_is_loaded(
    history: History, clock: FakeClock, signer: Signer | None
) -> None:
    version = keep(history, "1", clock, signer=signer)
    with pytest.raises(NotOurs, match="MAC"):
        history.load(version, KEY)
    version = keep(history, "1", clock, signer=KEY)
    loaded = history.load(version, KEY)
    assert loaded is not None
    os.close(loaded[1])


def test_files_left_by_a_killed_writer_are_removed_and_other_files_are_not(history: History, clock: FakeClock) -> None:
    keep(history, "1", clock)
    for name in ("notes.txt", "old.tmp", "new.tmp", "x.avapsnap"):
        (history.directory / name).touch()
        os.utime(history.directory / name, (clock.now, clock.now))
    os.utime(history.directory / "old.tmp", (clock.now - 4000, clock.now - 4000))
    version = keep(history, "2", clock)
    assert version in versions(history)
    left = {path.name for path in history.directory.iterdir() if len(path.name) < 20}
    assert left == {"notes.txt", "new.tmp", "x.avapsnap"}


def test_a_directory_that_cannot_be_read_or_written_is_an_error(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "history").touch()
    history = History(tmp_path, 3, clock)
    with pytest.raises(StoreError, match="cannot read"):
        history.entries()
    with pytest.raises(StoreError, match="cannot write"):
        keep(history, "1", clock)


def test_after_a_rotation_files_of_the_old_key_have_the_mac_of_the_new_one(history: History, clock: FakeClock) -> None:
    new = Signer("new key")
    ours = [keep(history, code, clock, signer=KEY) for code in ("1", "2")]
    listed = history.entries()
    unsigned = keep(history, "3", clock)
    already = keep(history, "4", clock, unsigned, *ours, signer=new)
    path_of(history, ours[0]).chmod(0o600)
    history.sign_again(KEY, new)
    for version in (*ours, already):
        loaded = history.load(version, new)
        assert loaded is not None
        os.close(loaded[1])
    with pytest.raises(NotOurs, match="no MAC"):
        history.load(unsigned, new)
    with pytest.raises(NotOurs, match="MAC is not ours"):
        history.load(ours[0], KEY)
    assert [entry for entry in history.entries() if entry.version_hash in ours] == listed
    assert history.take_problems() == []


def test_a_full_disk_during_a_rotation_leaves_files_unchanged_and_is_noted(
    history: History, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = keep(history, "1", clock, signer=KEY)
    monkeypatch.setattr(os, "sendfile", _no_space)
    history.sign_again(KEY, Signer("new key"))
    assert [problem for problem in history.take_problems() if "No space left" in problem]
    loaded = history.load(version, KEY)
    assert loaded is not None
    os.close(loaded[1])
    assert [path.suffix for path in history.directory.iterdir()] == [".avapsnap"]


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_when_a_file_vanishes_during_a_rotation_the_others_still_get_their_new_mac(
    history: History, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Signer("new")
    older, newer = keep(history, "1", clock, signer=KEY), keep(history, "2", clock, signer=KEY)
    load = history.load
    monkeypatch.setattr(history, "load", lambda version, key: None if version == newer else load(version, key))
    history.sign_again(KEY, new)
    found = load(older, new)
    assert found is not None
    os.close(found[1])
