"""Each secret that can be replaced while the server runs is read again independently. If its new value is bad, the last
good value remains in use, and the other secrets are not delayed."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest
from tests.support.certificates import Authority
from tests.support.leftovers import nothing_left
from tests.support.logs import captured_logs, logged
from tests.support.loop import eventually

from definition_server.control_plane import reload
from definition_server.control_plane.postgres import url_fault
from definition_server.control_plane.reload import Reloadable, Reloader
from definition_server.control_plane.tls_reader import read_tls_files
from definition_server.environment import load_settings
from definition_server.ipc.tls_files import TlsFiles
from definition_server.settings import Settings

MARK = "hunter2"


class Files:
    """The files of a server's secrets and certificate; at first, all are good."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.folder = folder
        self.variables = {
            "DATABASE_URL_FILE": self.write("url", "postgresql://u:p@h/d"),
            "API_KEYS_FILE": self.write("keys", "old:one"),
            "AVAP_INTERNAL_KEY_FILE": self.write("signing", "first"),
            "TLS_CERT_FILE": str(folder / "cert"),
            "TLS_KEY_FILE": str(folder / "key"),
        }
        self.show("first")

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)

    def show(self, name: str) -> None:
        made = self.authority.sign(name)
        shutil.copy(made.cert, self.folder / "cert")
        shutil.copy(made.key, self.folder / "key")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    files = Files(tmp_path)
    for name in ("DATABASE_URL", "API_KEY", "API_KEYS", "AVAP_INTERNAL_KEY", "API_KEY_FILE", "TLS_CLIENT_CA_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in files.variables.items():
        monkeypatch.setenv(name, value)
    return files


async def read_again(reloader: Reloader) -> list[Reloadable]:
    applied = []

    async def apply(what: Reloadable, _: Settings) -> None:
        applied.append(what)

    await reloader.read_again(apply)
    return applied


def reloader() -> Reloader:
    return Reloader(load_settings(Settings), {"DATABASE_URL": url_fault})


async def test_every_good_secret_is_used(files: Files) -> None:
    reading = reloader()
    files.write("url", "postgresql://u:other@h/d")
    files.write("keys", "old:one\nnew:two")
    files.write("signing", "second\n")
    files.show("second")
    with captured_logs() as lines:
        assert set(await read_again(reading)) == set(Reloadable)
    read = [line["what"] for line in logged(lines, "Settings read again", log_level="info")]
    assert sorted(read) == sorted(what.variables for what in Reloadable)
    assert "AVAP_INTERNAL_KEY, AVAP_INTERNAL_KEY_PREVIOUS" in read
    settings = reading.settings
    assert reading.tls is not None
    reading.tls.close()
    assert settings.database_url.get_secret_value() == "postgresql://u:other@h/d"
    assert settings.keys_by_id() == {"old": "one", "new": "two"}
    assert settings.avap_internal_key is not None
    assert settings.avap_internal_key.get_secret_value() == "second"


BAD = {
    Reloadable.DATABASE_URL: ("url", f"Postgres://u:{MARK}@h/d"),
    Reloadable.API_KEYS: ("keys", f"old:one\nnew {MARK}"),
    Reloadable.SIGNING_KEY: ("signing", f"{MARK} "),
    Reloadable.CERTIFICATE: ("key", "no key"),
}


GOOD = {
    Reloadable.DATABASE_URL: ("url", "postgresql://h/d"),
    Reloadable.API_KEYS: ("keys", "a:b"),
    Reloadable.SIGNING_KEY: ("signing", "x"),
}


@pytest.mark.parametrize("bad", list(Reloadable), ids=lambda what: what.name)
async def test_a_bad_secret_is_logged_keeps_its_old_value_and_does_not_delay_other_secrets(
    bad: Reloadable, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    reading = reloader()
    before = reading.settings
    files.write(*BAD[bad])
    assert set(await read_again(reading)) == set(Reloadable) - {bad}
    assert [getattr(reading.settings, name) for name in bad.value] == [getattr(before, name) for name in bad.value]
    told = capsys.readouterr().out
    assert "Settings not read again; the old ones stay" in told
    assert bad.variables.partition(",")[0] in told
    assert MARK not in told
    name, good = GOOD.get(bad, ("unused", ""))
    files.write(name, good)
    files.show("third")
    assert set(await read_again(reading)) == set(Reloadable)


async def test_the_old_values_are_kept_if_no_thread_can_start_and_all_are_read_at_the_next_reload(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading = reloader()

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert await read_again(reading) == []
    assert capsys.readouterr().out.count("no thread can be started: can't start new thread") == len(Reloadable)
    assert set(await read_again(reading)) == set(Reloadable)
    assert reading.tls is not None
    reading.tls.close()


async def test_the_last_good_set_of_tls_files_is_kept_and_the_previous_one_is_closed(files: Files) -> None:
    settings = load_settings(Settings)
    with nothing_left():
        first = read_tls_files(settings)
        reading = Reloader(settings, {}, first)
        assert first is not None
        kept = first.octets()
        files.write("key", "no key")
        await read_again(reading)
        assert reading.tls is first
        assert first.octets() == kept
        files.show("second")
        await read_again(reading)
        assert first.descriptors == ()
        assert reading.tls is not None
        assert reading.tls.octets()[0] == (files.folder / "cert").read_bytes()
        reading.tls.close()


async def test_tls_files_that_are_read_too_late_are_closed(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    found: list[TlsFiles] = []

    def slow(settings: Settings) -> TlsFiles | None:
        released.wait(30)
        tls = read_tls_files(settings)
        assert tls is not None
        found.append(tls)
        return tls

    monkeypatch.setattr(reload, "read_tls_files", slow)
    monkeypatch.setattr(reload, "_READ_SECONDS", 0.5)
    reading = Reloader(load_settings(Settings), {})
    assert Reloadable.CERTIFICATE not in await read_again(reading)
    released.set()
    await eventually(lambda: bool(found) and found[0].descriptors == (), "the files are closed")
    assert reading.tls is None


async def test_secrets_from_variables_are_not_read_again(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL_FILE", "AVAP_INTERNAL_KEY_FILE", "TLS_CERT_FILE", "TLS_KEY_FILE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/d")
    assert await read_again(reloader()) == [Reloadable.API_KEYS]


async def test_a_file_that_hangs_delays_no_other_file_and_occupies_one_thread(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()
    reading = reloader()

    def check(_: str) -> None:
        if threading.current_thread().name == "reload-database_url":
            released.wait(30)

    hanging = Reloader(reading.settings, {"DATABASE_URL": check})
    monkeypatch.setattr(reload, "_READ_SECONDS", 1.0)
    try:
        for _ in range(2):
            assert set(await read_again(hanging)) == set(Reloadable) - {Reloadable.DATABASE_URL}
        hung = [thread for thread in threading.enumerate() if thread.name == "reload-database_url"]
        assert len(hung) == 1
        assert hung[0].daemon
        told = capsys.readouterr().out
        assert "does a disk hang?" in told
        assert "has not ended" in told
    finally:
        released.set()
    hung[0].join(10)
    await asyncio.sleep(0)
