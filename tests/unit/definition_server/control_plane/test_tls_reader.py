"""The octets that were read are checked, even if the files change afterwards. A refusal names the variable."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.certificates import Authority, Certificate

from definition_server.control_plane import tls_reader
from definition_server.control_plane.tls_reader import read_tls_files
from definition_server.environment import SettingsError, load_settings
from definition_server.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def shown(authority: Authority) -> Certificate:
    return authority.sign("shown")


@pytest.fixture
def settings(authority: Authority, shown: Certificate) -> Settings:
    """Settings that name the present files, and are checked with them."""
    return load_settings(
        Settings,
        DATABASE_URL="postgresql://h/d",
        API_KEY="key",
        TLS_CERT_FILE=str(shown.cert),
        TLS_KEY_FILE=str(shown.key),
        TLS_CLIENT_CA_FILE=str(authority.cert),
    )


def test_octets_that_were_read_stay_when_the_files_change(settings: Settings, shown: Certificate) -> None:
    before = shown.key.read_bytes()
    files = read_tls_files(settings)
    assert files is not None
    with files:
        shown.key.write_text("no key")
        assert files.octets()[1] == before


def test_without_tls_there_is_nothing_to_read() -> None:
    assert read_tls_files(load_settings(Settings, DATABASE_URL="postgresql://h/d", API_KEY="key")) is None


DAMAGES: dict[str, tuple[Callable[[Authority, Certificate], object], str]] = {
    "other key": (lambda authority, shown: shutil.copy(authority.sign("other").key, shown.key), "TLS_KEY_FILE"),
    "half a certificate": (lambda _, shown: shown.cert.write_bytes(shown.cert.read_bytes()[:300]), "TLS_CERT_FILE"),
    "empty": (lambda _, shown: shown.key.write_bytes(b""), "TLS_KEY_FILE"),
    "no certificate": (lambda _, shown: shown.cert.unlink(), "TLS_CERT_FILE"),
    "no key": (lambda _, shown: shown.key.unlink(), "TLS_KEY_FILE"),
    "no authority": (lambda authority, _: authority.cert.write_text("none"), "TLS_CLIENT_CA_FILE"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_files_that_changed_since_they_were_judged_are_refused(
    damage: str, settings: Settings, authority: Authority, shown: Certificate
) -> None:
    change, variable = DAMAGES[damage]
    change(authority, shown)
    with pytest.raises(SettingsError) as caught:
        read_tls_files(settings)
    (problem,) = caught.value.problems
    assert problem.variable == variable
    assert problem.remedy
    assert "/proc/" not in str(problem)


def test_the_refusal_names_the_reason_if_descriptors_run_out(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*_: bytes | None) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(tls_reader.TlsFiles, "seal", scarce)
    with pytest.raises(SettingsError, match="Too many open files"):
        read_tls_files(settings)
