"""TLS files in sealed memory: libraries load them by path, nothing else is accepted, and no descriptor is left open."""

from __future__ import annotations

import fcntl
import os
import ssl
from pathlib import Path

import pytest
from tests.support.certificates import Authority

from definition_server.ipc.memory import SEALS, NotSealedError, create_sealed
from definition_server.ipc.tls_files import TlsFiles

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.parametrize("mutual", [False, True], ids=["server", "mutual"])
def test_a_context_can_load_the_memory_by_its_path_any_number_of_times(mutual: bool, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    made = authority.sign("server")
    contents = [path.read_bytes() for path in (made.cert, made.key, *([authority.cert] if mutual else []))]
    with TlsFiles.seal(*contents) as files:
        for _ in range(2):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files.certificate, files.key)
            if files.client_authorities is not None:
                context.load_verify_locations(files.client_authorities)
            assert len(context.get_ca_certs()) == mutual
            assert [each for each in files.octets() if each is not None] == contents
    assert files.descriptors == ()


@pytest.mark.parametrize("count", [0, 1, 4])
def test_another_number_of_descriptors_is_refused_and_closed(count: int) -> None:
    with pytest.raises(NotSealedError, match="2 or 3"):
        TlsFiles([create_sealed("test", [b"x"]) for _ in range(count)])


@pytest.mark.parametrize("kind", ["open memory", "pipe"])
def test_a_file_that_could_still_change_is_refused_and_closed(kind: str) -> None:
    ends: tuple[int, ...]
    if kind == "pipe":
        ends = os.pipe()
    else:
        ends = (create_sealed("test", [b"x"]), os.memfd_create("test", os.MFD_ALLOW_SEALING))
    with pytest.raises(NotSealedError, match="could still change"):
        TlsFiles(ends)


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
def test_memory_that_lacks_any_seal_could_still_change(seal: int) -> None:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(descriptor, b"x")
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS & ~seal)
    with pytest.raises(NotSealedError, match="could still change"):
        TlsFiles([create_sealed("test", [b"x"]), descriptor])


def test_descriptors_already_made_are_closed_if_descriptors_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def scarce(name: str, pieces: list[bytes]) -> int:
        if made:
            raise OSError(24, "Too many open files")
        made.append(create_sealed(name, pieces))
        return made[-1]

    monkeypatch.setattr("definition_server.ipc.tls_files.create_sealed", scarce)
    with pytest.raises(OSError, match="Too many"):
        TlsFiles.seal(b"certificate", b"key")
