"""Sealed memory holds exactly the pieces that it was made of, for any division of the writes by the kernel. No process,
its creator included, can change it any more. Memory that could still change is not mapped, and no failure leaks a
descriptor.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from definition_server.ipc.memory import SEALS, NotSealedError, create_sealed, map_sealed

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@contextmanager
def sealed(*pieces: bytes | memoryview) -> Iterator[int]:
    descriptor = create_sealed("test", pieces)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def memfd(content: bytes, seals: int = 0) -> Iterator[int]:
    """Memory with ``seals``, created without our code."""
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(descriptor, content)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size + 1, 0)


# -- the content -------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=20), max_size=30))
@example([])
@example([b""])
@example([b"", b"a", b"", b"", b"b", b""])
def test_the_memory_holds_the_pieces_one_after_the_other(pieces: list[bytes]) -> None:
    with sealed(*pieces) as descriptor:
        assert content(descriptor) == b"".join(pieces)


@pytest.mark.parametrize("count", [1023, 1024, 1025, 5000])
def test_more_pieces_than_one_system_call_accepts_are_written(count: int) -> None:
    pieces = [b"" if number % 7 == 0 else b"%d," % number for number in range(count)]
    with sealed(*pieces) as descriptor:
        assert content(descriptor) == b"".join(pieces)


@pytest.mark.parametrize(
    ("octets", "count", "calls"),
    [(1, 1024, [1024]), (1, 2500, [1024, 1024, 452]), (1 << 19, 5, [2, 2, 1])],
    ids=["as many as fit", "small ones", "large ones"],
)
def test_as_many_pieces_as_a_system_call_takes_are_written_at_once_up_to_a_mebibyte(
    octets: int, count: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    write = os.writev

    def noted(descriptor: int, pieces: list[bytes]) -> int:
        found.append(len(pieces))
        return write(descriptor, pieces)

    monkeypatch.setattr(os, "writev", noted)
    with sealed(*[b"x" * octets] * count):
        assert found == calls


def test_a_piece_is_written_before_many_later_octets_are_requested() -> None:
    """A piece is freed when the next one is requested, so a catalogue is not in memory twice while it is written."""
    octets, waiting = 1 << 20, 0

    def pieces() -> Iterator[bytes]:
        nonlocal waiting
        for _ in range(5):
            waiting += 1
            yield b"x" * octets
            assert Path(f"/proc/self/fd/{descriptors[-1]}").stat().st_size == waiting * octets

    descriptors: list[int] = []
    create = os.memfd_create

    def noted(name: str, flags: int) -> int:
        descriptors.append(create(name, flags))
        return descriptors[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "memfd_create", noted)
        os.close(create_sealed("test", pieces()))
    assert waiting == 5


def test_pieces_may_be_views_and_may_be_yielded_one_by_one() -> None:
    whole = memoryview(bytes(range(256)) * 100)
    descriptor = create_sealed("test", (whole[start : start + 100] for start in range(0, len(whole), 100)))
    try:
        assert content(descriptor) == whole
    finally:
        os.close(descriptor)


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=9), st.lists(st.integers(1, 12), min_size=1, max_size=4))
@example([b"abc", b"", b"defg", b"h"], [3])
@example([b"abc", b"", b"defg", b"h"], [1])
@example([b"abc", b"", b"defg", b"h"], [5, 1])
def test_a_partial_write_loses_and_repeats_nothing(pieces: list[bytes], steps: list[int]) -> None:
    """The kernel may write less than it was given (``write(2)``), of a vector as well as of one buffer."""
    write, counts = os.write, iter(steps * 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "writev", lambda fd, parts: write(fd, b"".join(parts)[: next(counts)]))
        patch.setattr(os, "write", lambda fd, part: write(fd, bytes(part)[: next(counts)]))
        with sealed(*pieces) as descriptor:
            assert content(descriptor) == b"".join(pieces)


# -- it cannot be changed ----------------------------------------------------------------------------------------------


def test_the_memory_can_neither_be_written_nor_resized_nor_unsealed() -> None:
    with sealed(b"snapshot") as descriptor:
        for change in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.pwrite(descriptor, b"x", 8),
            lambda: os.ftruncate(descriptor, 7),
            lambda: os.ftruncate(descriptor, 9),
            lambda: os.posix_fallocate(descriptor, 0, 9),
            lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
            lambda: mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        ):
            with pytest.raises(PermissionError):
                change()
        assert content(descriptor) == b"snapshot"


def test_the_memory_cannot_be_changed_through_a_reopened_descriptor() -> None:
    with sealed(b"snapshot") as descriptor:
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.pwrite(again, b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(again, 0)
        finally:
            os.close(again)


def test_the_mapping_is_read_only_and_outlives_the_descriptor() -> None:
    with sealed(b"snap", b"shot") as descriptor:
        mapping = map_sealed(descriptor)
    assert mapping[:] == b"snapshot"
    with pytest.raises(TypeError):
        mapping[0] = 0
    mapping.close()


def test_two_mappings_of_one_memory_are_one_copy() -> None:
    with sealed(b"snapshot") as descriptor, map_sealed(descriptor) as first, map_sealed(descriptor) as second:
        assert first[:] == second[:]
        inodes = {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:test" in line}
        assert inodes == {str(os.fstat(descriptor).st_ino)}


# -- memory that could change is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seals",
    [0, *(SEALS & ~seal for seal in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL))],
)
def test_memory_that_lacks_any_seal_is_not_mapped(seals: int) -> None:
    with memfd(b"snapshot", seals) as descriptor, pytest.raises(NotSealedError, match=f"{seals:#x} found"):
        map_sealed(descriptor)


def test_memory_sealed_by_another_process_is_mapped() -> None:
    with memfd(b"snapshot", SEALS) as descriptor, map_sealed(descriptor) as mapping:
        assert mapping[:] == b"snapshot"


def test_a_descriptor_that_is_not_a_memfd_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"snapshot")
    ours, theirs = socket.socketpair()
    with path.open("rb") as file, ours, theirs:
        for descriptor in (file.fileno(), ours.fileno()):
            with pytest.raises((NotSealedError, OSError)):
                map_sealed(descriptor)


def test_memory_of_one_octet_is_mapped() -> None:
    with sealed(b"x") as descriptor, map_sealed(descriptor) as mapping:
        assert mapping[:] == b"x"


def test_empty_memory_is_refused() -> None:
    """It raises the documented exception, because a worker must survive every descriptor that it gets."""
    with sealed() as descriptor, pytest.raises((NotSealedError, OSError)):
        map_sealed(descriptor)


# -- nothing leaks -----------------------------------------------------------------------------------------------------


def test_the_descriptor_is_not_inherited_by_default() -> None:
    with sealed(b"snapshot") as descriptor:
        assert os.get_inheritable(descriptor) is False


class Interrupted(BaseException):
    """Like KeyboardInterrupt not an `Exception`."""


def test_an_exception_while_writing_leaves_no_descriptor_open() -> None:
    def pieces() -> Iterator[bytes]:
        yield from [b"x"] * 2000
        raise Interrupted

    with pytest.raises(Interrupted):  # the fixture checks that nothing is left
        create_sealed("test", pieces())


def test_memory_that_cannot_be_sealed_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "MFD_ALLOW_SEALING", 0)
    with pytest.raises(PermissionError):
        create_sealed("test", [b"x"])
