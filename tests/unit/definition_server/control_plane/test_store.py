"""The last-known-good file is complete or absent, even if its writer is killed. A damaged file is never served."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.snapshots import built

from definition_server.catalog.layout import FOOTER_SIZE
from definition_server.catalog.signing import Signer
from definition_server.control_plane import store as store_module
from definition_server.control_plane.store import FILE_NAME, NotOurs, SnapshotStore, StoreError, has_mac_of, without_mac
from definition_server.ipc.memory import create_sealed

pytestmark = pytest.mark.usefixtures("nothing_is_left")

OLD = built("old", generation=1).to_bytes()
NEW = built("if", "else", "end", generation=2).to_bytes()


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path)


def save(store: SnapshotStore, octets: bytes) -> None:
    descriptor = create_sealed("test", [octets])
    try:
        store.save(descriptor)
    finally:
        os.close(descriptor)


def load(store: SnapshotStore) -> bytes | None:
    loaded = store.load()
    if loaded is None:
        return None
    snapshot, descriptor = loaded
    os.close(descriptor)
    return bytes(snapshot.buffer)


def files(store: SnapshotStore) -> list[str]:
    return sorted(path.name for path in store.path.parent.iterdir())


# -- writing and reading ---------------------------------------------------------------------------------------------


def test_a_stored_snapshot_is_loaded_byte_for_byte(store: SnapshotStore) -> None:
    save(store, NEW)
    assert store.path.read_bytes() == NEW
    assert load(store) == NEW


def test_a_snapshot_above_one_chunk_is_stored_and_loaded_whole(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_CHUNK", 4096)
    large = built(*(f"command{n}" for n in range(100))).to_bytes()
    assert len(large) > 2 * 4096
    assert len(large) % 4096
    save(store, large)
    assert load(store) == large


def test_a_loaded_snapshot_is_sealed(store: SnapshotStore) -> None:
    save(store, NEW)
    loaded = store.load()
    assert loaded is not None
    try:
        with pytest.raises(PermissionError):
            os.write(loaded[1], b"x")
    finally:
        os.close(loaded[1])


def test_the_next_snapshot_replaces_the_stored_one(store: SnapshotStore) -> None:
    save(store, OLD)
    save(store, NEW)
    assert load(store) == NEW
    assert files(store) == [FILE_NAME]


def test_the_directory_is_created_with_its_parents(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "not" / "yet" / "there")
    save(store, NEW)
    assert load(store) == NEW


def test_only_the_owner_may_read_the_file(store: SnapshotStore) -> None:
    save(store, NEW)
    assert store.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("made", [True, False], ids=["empty directory", "no directory"])
def test_an_empty_directory_loads_nothing(tmp_path: Path, made: bool) -> None:
    assert load(SnapshotStore(tmp_path if made else tmp_path / "missing")) is None


# -- failing writes --------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, OLD)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=rf"cannot write {store.path}: No space left on device"):
        save(store, NEW)
    monkeypatch.undo()
    assert load(store) == OLD
    assert files(store) == [FILE_NAME]


def test_a_directory_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = SnapshotStore(tmp_path / "file" / "directory")
    with pytest.raises(StoreError, match=f"cannot write {store.path}: Not a directory"):
        save(store, NEW)
    with pytest.raises(StoreError, match=f"cannot read {store.path}: Not a directory"):
        load(store)


def test_the_file_is_synced_before_the_rename_and_the_directory_before_the_return(
    store: SnapshotStore, disk_acts: list[str]
) -> None:
    save(store, NEW)
    assert disk_acts == ["fsync .tmp", "rename .tmp to .avapsnap", "fsync directory"]


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from definition_server.control_plane.store import SnapshotStore

moment, number, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
owner = Path if moment == "replace" else os
work, calls = getattr(owner, moment), 0

def killed(*arguments):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*arguments)

setattr(owner, moment, killed)
SnapshotStore(directory).save(os.open(sys.argv[4], os.O_RDONLY))
"""


@pytest.mark.parametrize(
    ("moment", "number", "found"),
    [("sendfile", 1, OLD), ("fsync", 1, OLD), ("replace", 1, OLD), ("fsync", 2, NEW)],
    ids=["before writing", "before the data are flushed", "before the rename", "after the rename"],
)
def test_a_killed_writer_leaves_a_whole_file_and_its_old_temporaries_are_removed(
    store: SnapshotStore, tmp_path_factory: pytest.TempPathFactory, moment: str, number: int, found: bytes
) -> None:
    save(store, OLD)
    source = tmp_path_factory.mktemp("source") / "snapshot"
    source.write_bytes(NEW)
    arguments = [moment, str(number), str(store.path.parent), str(source)]
    writer = subprocess.run([sys.executable, "-c", KILLED_WRITER, *arguments], timeout=60, check=False)
    assert writer.returncode == -signal.SIGKILL
    assert load(store) == found
    remains = [store.path.with_name(name) for name in files(store) if name != FILE_NAME]
    assert len(remains) == (1 if found == OLD else 0)
    save(store, NEW)
    assert files(store) == sorted([FILE_NAME, *(path.name for path in remains)]), "another server may still write it"
    for path in remains:
        os.utime(path, (0, 0))
    save(store, NEW)
    assert files(store) == [FILE_NAME]
    assert load(store) == NEW


def test_other_files_of_the_directory_are_left_alone(store: SnapshotStore) -> None:
    for name in ("notes.tmp", "last-known-good.avapsnap.bak"):
        store.path.with_name(name).touch()
        os.utime(store.path.with_name(name), (0, 0))
    save(store, NEW)
    assert files(store) == ["last-known-good.avapsnap", "last-known-good.avapsnap.bak", "notes.tmp"]


def test_a_short_sendfile_is_continued(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sendfile = os.sendfile
    monkeypatch.setattr(os, "sendfile", lambda out, in_, offset, count: sendfile(out, in_, offset, min(count, 100)))
    save(store, NEW)
    assert load(store) == NEW


def test_a_reader_never_sees_an_incomplete_file_while_the_writer_works(store: SnapshotStore) -> None:
    save(store, OLD)
    seen: list[bytes | None] = []
    written = threading.Event()

    def read() -> None:
        while not written.is_set():
            seen.append(load(store))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(50):
            save(store, (OLD, NEW)[number % 2])
    finally:
        written.set()
        reader.join(30)
    assert seen
    assert set(seen) <= {OLD, NEW}


# -- damage ----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "empty": (lambda octets: b"", "truncated"),
    "shorter than a footer": (lambda octets: octets[:100], "truncated"),
    "cut at the end": (lambda octets: octets[:-1], "magic"),
    "cut at the front": (lambda octets: octets[1:], "size"),
    "lengthened": (lambda octets: octets + b"\0", "magic"),
    "in the body": (lambda octets: flipped(octets, 5), "content checksum"),
    "in the index": (lambda octets: flipped(octets, len(octets) - FOOTER_SIZE - 1), "content checksum"),
    "in the magic": (lambda octets: flipped(octets, len(octets) - FOOTER_SIZE), "magic"),
    "in the format": (lambda octets: flipped(octets, len(octets) - FOOTER_SIZE + 8), "format"),
    "in the footer": (lambda octets: flipped(octets, len(octets) - FOOTER_SIZE + 20), "footer checksum"),
    "another file": (lambda octets: b"PK\3\4" * 1000, "magic"),
}


def flipped(octets: bytes, position: int, bits: int = 1) -> bytes:
    changed = bytearray(octets)
    changed[position] ^= bits
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_and_the_check_named(store: SnapshotStore, damage: str) -> None:
    change, check = DAMAGE[damage]
    store.path.write_bytes(change(NEW))
    with pytest.raises(StoreError, match=f"{store.path} is not usable: .*{check}"):
        store.load()


@pytest.fixture(scope="module")
def module_store(tmp_path_factory: pytest.TempPathFactory) -> SnapshotStore:
    return SnapshotStore(tmp_path_factory.mktemp("store"))


@given(position=st.integers(0, len(NEW) - 1), bits=st.integers(1, 255))
def test_a_file_with_a_changed_octet_is_not_loaded(module_store: SnapshotStore, position: int, bits: int) -> None:
    module_store.path.write_bytes(flipped(NEW, position, bits))
    with pytest.raises(StoreError):
        module_store.load()


def test_a_file_that_is_not_a_snapshot_is_refused_before_it_is_copied_to_memory(store: SnapshotStore) -> None:
    """For example a link to another file of the server's account, which may have any size."""
    with store.path.open("wb") as file:
        file.truncate(1 << 40)
    store.path.chmod(0o600)
    began = time.process_time()
    with pytest.raises(StoreError, match="magic"):
        store.load()
    assert time.process_time() - began < 1, "a terabyte is not read"


def test_a_damaged_file_is_replaced_by_the_next_snapshot(store: SnapshotStore) -> None:
    store.path.write_bytes(b"garbage")
    save(store, NEW)
    assert load(store) == NEW


# -- only files of the server are read ------------------------------------------------------------------------------

SIGNER = Signer("key")


def keep(store: SnapshotStore, signer: Signer | None) -> None:
    descriptor = create_sealed("test", [NEW])
    try:
        store.save(descriptor, signer)
    finally:
        os.close(descriptor)


def refusal(store: SnapshotStore, signer: Signer | None = None) -> str:
    with pytest.raises(NotOurs) as refused:
        store.load(signer)
    return str(refused.value)


def test_a_file_with_our_mac_is_loaded_and_can_be_inspected_without_the_mac(store: SnapshotStore) -> None:
    keep(store, SIGNER)
    loaded = store.load(SIGNER)
    assert loaded is not None
    os.close(loaded[1])
    assert bytes(loaded[0].buffer) == NEW == bytes(without_mac(store.path.read_bytes()))
    assert len(store.path.read_bytes()) == len(NEW) + 40
    assert load(store) == NEW, "without a key the MAC cannot be verified"


def test_a_mac_is_recognised_at_the_end_of_a_file_of_any_length(store: SnapshotStore) -> None:
    keep(store, SIGNER)
    octets = store.path.read_bytes()
    assert has_mac_of(store.path, SIGNER)
    assert not has_mac_of(store.path, Signer("other key"))
    end = octets[-FOOTER_SIZE - 40 :]
    for content, recognised in ((end, True), (b"x" + end, True), (end[1:], False), (b"", False), (NEW, False)):
        store.path.write_bytes(content)
        assert has_mac_of(store.path, SIGNER) is recognised


def test_the_mac_is_keyed_by_a_key_of_its_own(store: SnapshotStore) -> None:
    keep(store, SIGNER)
    footer = NEW[-FOOTER_SIZE:]
    assert store.path.read_bytes()[-32:] != hmac.digest(b"key", footer, hashlib.sha256)
    assert SIGNER.pack(footer)[10:42] != store.path.read_bytes()[-32:]


@pytest.mark.parametrize("signer", [None, Signer("other key")], ids=["no key", "another key"])
def test_with_a_key_a_file_without_our_mac_is_refused(store: SnapshotStore, signer: Signer | None) -> None:
    keep(store, signer)
    assert "MAC" in refusal(store, SIGNER)


def test_every_changed_octet_is_refused(store: SnapshotStore) -> None:
    keep(store, SIGNER)
    octets = store.path.read_bytes()
    for position in range(0, len(octets), 7):
        store.path.write_bytes(octets[:position] + bytes([octets[position] ^ 1]) + octets[position + 1 :])
        with pytest.raises(StoreError):
            store.load(SIGNER)


def test_a_file_that_others_may_write_is_refused(store: SnapshotStore) -> None:
    for mode in (0o620, 0o602, 0o666):
        keep(store, SIGNER)
        store.path.chmod(mode)
        assert f"{mode:04o}" in refusal(store, SIGNER)
    store.path.chmod(0o644)
    assert load(store) == NEW


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(store: SnapshotStore) -> None:
    keep(store, None)
    os.chown(store.path, 12_345, -1)
    assert "belongs to user 12345" in refusal(store)


def test_links_pipes_and_directories_are_refused_at_once(store: SnapshotStore, tmp_path: Path) -> None:
    keep(store, None)
    store.path.rename(tmp_path / "elsewhere")
    store.path.symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in refusal(store)
    store.path.unlink()
    os.mkfifo(store.path)
    assert "not a regular file" in refusal(store)
    store.path.unlink()
    store.path.mkdir()
    assert "not a regular file" in refusal(store)


def test_a_refused_file_is_moved_aside_and_not_overwritten(store: SnapshotStore) -> None:
    keep(store, None)
    foreign = store.path.read_bytes()
    refusal(store, SIGNER)
    assert store.path.read_bytes() == foreign, "the file is left alone until there is something to store"
    keep(store, SIGNER)
    assert store.path.with_name(FILE_NAME + ".refused").read_bytes() == foreign
    keep(store, SIGNER)
    assert store.path.with_name(FILE_NAME + ".refused").read_bytes() == foreign
    assert files(store) == [FILE_NAME, FILE_NAME + ".refused"]


@pytest.mark.parametrize("kind", ["a directory", "a link", "a file that others may write"])
def test_a_foreign_file_is_moved_aside_even_if_it_was_not_loaded(
    store: SnapshotStore, tmp_path: Path, kind: str
) -> None:
    if kind == "a directory":
        (store.path / "content").mkdir(parents=True)
    elif kind == "a link":
        store.path.symlink_to(tmp_path / "nothing")
    else:
        store.path.write_bytes(OLD)
        store.path.chmod(0o666)
    before = store.path.lstat().st_ino
    save(store, NEW)
    assert load(store) == NEW
    assert store.path.with_name(FILE_NAME + ".refused").lstat().st_ino == before


@pytest.mark.parametrize("content", ["content", ""], ids=["with content", "empty"])
@pytest.mark.parametrize("kind", ["a file", "a directory"])
def test_if_a_directory_has_the_name_for_evidence_the_evidence_is_kept_and_the_next_catalogue_stored(
    store: SnapshotStore, kind: str, content: str
) -> None:
    (store.path.with_name(FILE_NAME + ".refused") / content).mkdir(parents=True)
    if kind == "a directory":
        store.path.mkdir()
    else:
        store.path.write_bytes(OLD)
        store.path.chmod(0o666)
    before = store.path.stat().st_ino
    save(store, NEW)
    assert load(store) == NEW
    assert before in [path.stat().st_ino for path in store.path.parent.rglob("*")]
    save(store, NEW)
    assert load(store) == NEW


def test_a_file_that_cannot_be_moved_aside_leaves_no_directory_behind(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.path / "content").mkdir(parents=True)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        with pytest.raises(StoreError, match="not permitted"):
            save(store, NEW)
    assert files(store) == [FILE_NAME]


@pytest.mark.parametrize("room", [0, 1, 39], ids=lambda room: f"room_for_{room}_octets_of_the_mac")
def test_a_write_that_is_cut_within_the_mac_replaces_nothing(store: SnapshotStore, room: int) -> None:
    """The kernel writes the octets that fit and returns their number, as on a disk that becomes full at this point."""
    keep(store, SIGNER)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) + room, hard))
    try:
        with pytest.raises(StoreError, match="File too large"):
            keep(store, SIGNER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loaded = store.load(SIGNER)
    assert loaded is not None
    os.close(loaded[1])
    assert files(store) == [FILE_NAME]


@pytest.mark.parametrize("kind", ["a directory", "a link to nothing", "a link to itself"])
def test_a_link_or_directory_named_like_a_temporary_file_does_not_prevent_storing(
    store: SnapshotStore, tmp_path: Path, kind: str
) -> None:
    odd = tmp_path / "last-known-good.x.tmp"
    if kind == "a directory":
        (odd / "content").mkdir(parents=True)
    else:
        odd.symlink_to("nothing" if kind == "a link to nothing" else odd.name)
    os.utime(odd, (1, 1), follow_symlinks=False)
    save(store, NEW)
    assert load(store) == NEW
    assert odd.is_dir() or not odd.is_symlink(), "an old link is removed"
