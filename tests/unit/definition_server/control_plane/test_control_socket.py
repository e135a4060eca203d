"""The control socket is open only to this account. It replaces the socket of a dead master, but never that of a running
master."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from definition_server.control_plane import control_socket
from definition_server.control_plane.control_socket import (
    LONGEST_PATH,
    ControlSocket,
    SocketUnusable,
    open_socket,
    stranger,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "control.sock"


@pytest.fixture
def opened(path: Path) -> Iterator[ControlSocket]:
    made = open_socket(path)
    yield made
    made.remove()
    made.listening.close()


def dead_socket(path: Path) -> None:
    """The file that a killed master leaves behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as once:
        once.bind(str(path))


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_file_has_mode_0600_with_any_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        made = open_socket(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    made.remove()
    made.listening.close()
    assert not path.exists()


def test_the_socket_of_a_dead_master_is_replaced(path: Path) -> None:
    dead_socket(path)
    made = open_socket(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
    made.remove()
    made.listening.close()


def test_the_socket_of_a_running_master_is_not_changed(opened: ControlSocket) -> None:
    with pytest.raises(SocketUnusable, match="another instance") as refused:
        open_socket(opened.path)
    assert "CONTROL_SOCKET" in refused.value.remedy
    assert opened.in_place


def test_a_file_that_is_not_a_socket_is_not_changed(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(SocketUnusable, match="not a socket"):
        open_socket(path)
    assert path.read_text() == "mine"


def test_a_path_that_is_too_long_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / ("x" * LONGEST_PATH)
    with pytest.raises(SocketUnusable, match=f"at most {LONGEST_PATH}") as refused:
        open_socket(path)
    assert "shorter" in refused.value.remedy


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "open files"),
        (errno.ENFILE, "open files"),
        (errno.ENOMEM, "memory limit"),
        (errno.ENOBUFS, "memory limit"),
        (errno.ENOSPC, "free space"),
        (errno.EROFS, "a directory that the server may write to"),
    ],
)
@pytest.mark.parametrize("where", ["socket", "bind"])
def test_a_refusal_of_the_kernel_is_named_with_a_remedy(
    path: Path, number: int, remedy: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(
        socket, "socket", refuse if where == "socket" else type("Refusing", (socket.socket,), {"bind": refuse})
    )
    with pytest.raises(SocketUnusable, match=os.strerror(number)) as caught:
        open_socket(path)
    assert remedy in caught.value.remedy
    assert not path.exists()


def test_a_directory_that_cannot_be_written_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SocketUnusable) as refused:
        open_socket(tmp_path / "file" / "control.sock")
    assert "CONTROL_SOCKET" in refused.value.remedy
    with pytest.raises(SocketUnusable):
        open_socket(Path("/proc/control.sock"))


def test_a_file_of_another_instance_is_not_removed_at_the_end(opened: ControlSocket) -> None:
    opened.path.unlink()
    dead_socket(opened.path)
    assert not opened.in_place
    opened.remove()
    assert opened.path.exists()


def test_a_peer_of_this_account_is_accepted_unless_it_is_a_worker() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        assert stranger(ours) is None
        assert stranger(ours, {os.getpid() + 1}) is None
        refused = stranger(ours, {os.getpid()})
    assert refused is not None
    assert "worker" in refused


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another uid")
def test_a_peer_of_another_account_is_refused(opened: ControlSocket) -> None:
    """The mode of the socket is changed, so that the kernel lets every account connect."""
    for each in (opened.path, *list(opened.path.parents)[:-1]):
        if each.stat().st_uid == os.geteuid() and str(each).count("/") > 1:
            each.chmod(0o777)
    program = "; ".join(
        (
            "import os, socket",
            "os.setgroups([])",
            "os.setgid(65534)",
            "os.setuid(65534)",
            "s = socket.socket(socket.AF_UNIX)",
            f"s.connect({str(opened.path)!r})",
            "s.recv(1)",
        )
    )
    with subprocess.Popen([sys.executable, "-c", program]) as peer:
        opened.listening.settimeout(20)
        connection, _ = opened.listening.accept()
        with connection:
            why = stranger(connection)
        assert peer.wait(20) == 0
    assert why is not None
    assert "uid 65534" in why


@pytest.mark.parametrize(
    ("held_until", "waited"),
    [(0.0, 0.0), (0.5, 0.5), (9.0, 2.0)],
    ids=["free", "held for half a second", "held for long"],
)
def test_a_directory_that_another_process_has_locked_is_tried_for_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_until: float, waited: float
) -> None:
    now, asked = [0.0], [0]

    def flock(number: int, operation: int) -> None:
        asked[0] += 1
        assert operation == fcntl.LOCK_EX | fcntl.LOCK_NB
        if now[0] < held_until:
            raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with control_socket._locked(tmp_path):
        pass
    monkeypatch.undo()
    assert now[0] == pytest.approx(waited, abs=0.03)
    assert asked[0] >= 1


def test_a_file_system_without_locks_causes_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    with control_socket._locked(tmp_path):
        pass
