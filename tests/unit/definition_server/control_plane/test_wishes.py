"""Pins and accepted hashes: which of them are in effect, and which are read back from disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from definition_server.catalog.signing import Signer
from definition_server.control_plane.store import NotOurs, StoreError
from definition_server.control_plane.wishes import Pin, Policy, Wishes, WishesFile

pytestmark = pytest.mark.usefixtures("nothing_is_left")

A, B = "a" * 64, "b" * 64
NOW = 1000.0


@pytest.fixture
def file(tmp_path: Path) -> WishesFile:
    return WishesFile(tmp_path)


# -- which are in effect ---------------------------------------------------------------------------------------------


def test_there_is_no_pin_and_no_acceptance_by_default() -> None:
    merged = Wishes().merge(Policy(), NOW)
    assert merged.pin is None
    assert not merged.accepts(A)


def test_a_pin_by_command_takes_precedence_over_one_of_the_policy_until_it_ends() -> None:
    wishes, policy = Wishes(pinned=Pin(A, NOW + 1)), Policy(pin=Pin(B))
    assert wishes.merge(policy, NOW).pin == Pin(A, NOW + 1, "command")
    assert wishes.merge(policy, NOW + 1).pin == Pin(B, None, "policy")
    assert wishes.merge(Policy(pin=Pin(B, NOW)), NOW + 1).pin is None


def test_the_end_of_a_pin_is_shown_as_a_time_with_its_zone() -> None:
    assert Pin(A, 1_796_058_017.47).until_text == "2026-11-30T17:00:17+00:00"
    assert Pin(A).until_text is None


def test_the_policy_may_shorten_a_hash_to_eight_digits_and_no_further() -> None:
    assert Wishes().merge(Policy(accept=(A[:8],)), NOW).accepts(A)
    assert not Wishes().merge(Policy(accept=(A[:7], "")), NOW).accepts(A)
    assert not Wishes().merge(Policy(accept=(A[:8],)), NOW).accepts(B)


def test_a_used_hash_is_not_accepted_again_and_a_limited_number_is_kept() -> None:
    wishes = Wishes().accept(A).accept(B).accept(A)
    assert wishes.accepted == (B, A)
    assert wishes.use_up(A).accepted == (B,)
    for number in range(500):
        wishes = wishes.accept(f"{number:064x}")
    assert len(wishes.accepted) == 100
    assert wishes.accepted[-1] == f"{499:064x}"


# -- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(),
        Wishes((A, B), Pin(A, 1234.5), 7),
        Wishes(pinned=Pin(B)),
    ],
    ids=["none", "all", "without end"],
)
def test_wishes_are_read_as_they_were_written_and_only_their_owner_may_read_them(
    file: WishesFile, wishes: Wishes
) -> None:
    file.write(wishes)
    assert file.read() == wishes
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


def test_without_a_file_there_is_no_wish(file: WishesFile) -> None:
    assert file.read() == Wishes()


DAMAGED = {
    "empty": b"",
    "cut": b'{"accept": [',
    "not utf-8": b"\xff\xfe",
    "a list": b"[]",
    "no list": b'{"accept": 5}',
    "no hash": b'{"accept": ["x"]}',
    "not hex": json.dumps({"accept": ["g" * 64]}).encode(),
    "pin is a text": b'{"accept": [], "pin": "x"}',
    "pin without version": b'{"accept": [], "pin": {}}',
    "until is a text": json.dumps({"accept": [], "pin": {"version": A, "until": "soon"}}).encode(),
    "until is true": json.dumps({"accept": [], "pin": {"version": A, "until": True}}).encode(),
    "until is NaN": b'{"accept": [], "pin": {"version": "' + A.encode() + b'", "until": NaN}}',
    "until is endless": b'{"accept": [], "pin": {"version": "' + A.encode() + b'", "until": Infinity}}',
    "until is later than any clock": b'{"accept": [], "pin": {"version": "' + A.encode() + b'", "until": 1e300}}',
    "until has 400 digits": b'{"accept": [], "pin": {"version": "%b", "until": %b}}' % (A.encode(), b"9" * 400),
    "until is before all time": b'{"accept": [], "pin": {"version": "' + A.encode() + b'", "until": -1e300}}',
    "rows without number": b'{"accept": [], "rows_held": ' + b"9" * 400 + b"}",
    "rows below zero": b'{"accept": [], "rows_held": -1}',
    "rows is true": b'{"accept": [], "rows_held": true}',
    "nested": b"[" * 100_000,
    "huge": b'{"accept": []}' + b" " * (1 << 20),
}


@pytest.mark.parametrize("octets", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_reported_and_moved_aside_and_the_next_file_is_used(file: WishesFile, octets: bytes) -> None:
    file.path.write_bytes(octets)
    file.path.chmod(0o600)
    with pytest.raises(StoreError, match="damaged"):
        file.read()
    assert file.path.with_name("wishes.json.damaged").read_bytes() == octets
    assert file.read() == Wishes()
    file.write(Wishes((A,)))
    assert file.read() == Wishes((A,))


OURS = Signer("our key")
PINNED = Wishes((B,), Pin(A, 1234.5), 7)


def forged(change: dict[str, object]) -> str:
    """A file of ours with another content, but with the MAC of the old content."""
    return json.dumps(json.loads(PINNED.to_json(OURS)) | change)


NOT_OURS = {
    "no MAC": PINNED.to_json(),
    "MAC of another key": PINNED.to_json(Signer("their key")),
    "another pin": forged({"pin": {"version": B, "until": None}}),
    "a later end": forged({"pin": {"version": A, "until": 1234.75}}),
    "another hash accepted": forged({"accept": [A]}),
    "more rows held": forged({"rows_held": 8}),
    "an unknown key": forged({"more": 1}),
    "MAC is a number": forged({"mac": 5}),
    "MAC is empty": forged({"mac": ""}),
    "MAC is not ASCII": forged({"mac": "\u00fc" * 64}),
}


@pytest.mark.parametrize("text", NOT_OURS.values(), ids=NOT_OURS)
def test_a_file_without_the_mac_of_the_key_is_not_used_and_is_moved_aside_by_the_next_write(
    file: WishesFile, text: str
) -> None:
    file.path.write_text(text)
    file.path.chmod(0o600)
    with pytest.raises(NotOurs, match="MAC"):
        file.read(OURS)
    assert file.path.read_text() == text, "reading changes nothing, so the file is kept as evidence"
    file.write(Wishes((A,)), OURS)
    assert file.path.with_name("wishes.json.refused").read_text() == text
    assert file.read(OURS) == Wishes((A,))


@pytest.mark.parametrize("key", [None, "our key"], ids=["no key", "key"])
def test_a_file_is_used_with_the_mac_of_the_key_or_without_a_key_with_any_mac_or_none(
    file: WishesFile, key: str | None
) -> None:
    signer = None if key is None else Signer(key)
    for written_by in (OURS, signer):
        file.write(PINNED, written_by)
        assert file.read(signer) == PINNED
        assert json.loads(file.path.read_text())["pin"]["version"] == A, "the file stays readable for people"


def test_the_mac_does_not_depend_on_the_layout_of_the_text_and_a_snapshots_mac_is_not_accepted_for_it() -> None:
    document = json.loads(PINNED.to_json(OURS))
    assert Wishes.from_json(json.dumps(dict(reversed(document.items()))), OURS) == PINNED
    content = json.dumps(
        {name: value for name, value in document.items() if name != "mac"}, sort_keys=True, separators=(",", ":")
    )
    assert bytes.fromhex(document["mac"]) != OURS.file_mac(content.encode())
    assert bytes.fromhex(document["mac"]) == OURS.wishes_mac(content.encode())


def test_a_file_that_others_may_write_is_not_used_and_is_moved_aside_by_the_next_write(file: WishesFile) -> None:
    file.write(Wishes((A,)))
    file.path.chmod(0o622)
    with pytest.raises(NotOurs, match="others may write"):
        file.read()
    file.write(Wishes((B,)))
    assert file.read() == Wishes((B,))
    assert A in file.path.with_name("wishes.json.refused").read_text()


def test_a_link_in_place_of_the_file_is_not_used(file: WishesFile, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(Wishes((A,)).to_json())
    file.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotOurs, match="symbolic link"):
        file.read()


@pytest.mark.parametrize("read", [True, False], ids=["read before", "not read"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "file that others may write"])
def test_another_object_in_place_of_the_file_is_not_used_and_is_moved_aside_by_the_next_write(
    file: WishesFile, kind: str, read: bool
) -> None:
    if kind == "fifo":
        os.mkfifo(file.path, 0o600)
    elif kind == "directory":
        (file.path / "content").mkdir(parents=True)
    else:
        file.path.write_text(Wishes((A,)).to_json())
        file.path.chmod(0o666)
    before = file.path.stat().st_ino
    if read:
        with pytest.raises(NotOurs, match=r"not a regular file|others may write"):
            file.read()
    file.write(Wishes((B,)))
    assert file.read() == Wishes((B,))
    assert file.path.with_name("wishes.json.refused").stat().st_ino == before


@pytest.mark.parametrize("suffix", ["refused", "damaged"])
def test_if_a_directory_has_the_name_for_evidence_the_evidence_is_kept_and_the_next_write_succeeds(
    file: WishesFile, suffix: str
) -> None:
    (file.path.with_name(f"wishes.json.{suffix}") / "content").mkdir(parents=True)
    file.path.write_text("{}")
    file.path.chmod(0o600 if suffix == "damaged" else 0o666)
    with pytest.raises(StoreError) as raised:
        file.read()
    file.write(Wishes((B,)))
    assert file.read() == Wishes((B,))
    (kept,) = file.path.parent.glob(f"wishes.json.{suffix}.*/wishes.json")
    assert kept.read_text() == "{}"
    assert suffix == "refused" or str(kept) in str(raised.value)


def test_a_damaged_file_that_cannot_be_moved_aside_is_not_reported_as_moved(
    file: WishesFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.path.write_text("{}")
    file.path.chmod(0o600)

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", read_only)
        with pytest.raises(StoreError, match=r"it cannot be kept beside it \(Read-only file system\)"):
            file.read()
    assert file.path.read_text() == "{}"
    assert [path.name for path in file.path.parent.iterdir()] == ["wishes.json"]


def test_a_write_that_fails_leaves_the_old_file(file: WishesFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write(Wishes((A,)))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            file.write(Wishes((B,)))
    assert file.read() == Wishes((A,))
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


def test_the_file_is_synced_before_the_rename_and_the_directory_before_the_return(
    file: WishesFile, disk_acts: list[str]
) -> None:
    file.write(Wishes((A,)))
    assert disk_acts == ["fsync .tmp", "rename .tmp to .json", "fsync directory"]


def test_the_temporary_file_of_a_writer_that_was_killed_is_removed_after_an_hour(file: WishesFile) -> None:
    old, recent = file.path.with_name("wishes.a.tmp"), file.path.with_name("wishes.b.tmp")
    for path in (old, recent):
        path.touch()
    os.utime(old, (1, 1))
    file.write(Wishes((A,)))
    assert not old.exists()
    assert recent.exists(), "another server may still write it"
