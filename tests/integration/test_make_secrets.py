"""deploy/compose/make-secrets: only the accounts of the containers can read the files that it writes."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy/compose/make-secrets"
FILES = {"api-key", "database-url", "postgres-password", "reader-password"}
IMAGE_ACCOUNT = 10001
NOBODY = 65534


def test_the_secrets_can_be_read_only_by_their_owner_with_any_umask(tmp_path: Path) -> None:
    directory = tmp_path / "secrets"
    done = subprocess.run([SCRIPT, directory], capture_output=True, text=True, check=True, umask=0)
    assert {path.name for path in directory.iterdir()} == FILES
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    owner = IMAGE_ACCOUNT if os.getuid() == 0 else os.getuid()
    for name in ("api-key", "database-url"):
        assert (directory / name).stat().st_uid == owner, "the account that compose.yaml runs the server as"
    for path in directory.iterdir():
        assert path.read_text() not in done.stdout + done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another account")
def test_an_ordinary_account_gets_the_uid_that_the_server_must_run_as(tmp_path: Path) -> None:
    script = tmp_path / "make-secrets"
    script.write_text(SCRIPT.read_text())
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to(Path(tempfile.gettempdir())) and path != Path(tempfile.gettempdir()):
            path.chmod(0o711)
    script.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    done = subprocess.run([script, home / "secrets"], capture_output=True, text=True, check=True, user=NOBODY, umask=0)
    assert f"SERVER_UID={NOBODY}" in done.stdout
    assert {path.stat().st_uid for path in (home / "secrets").iterdir()} == {NOBODY}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (home / "secrets").iterdir()} == {0o600}
