"""A hot standby of an embedded PostgreSQL that stops replaying on request, so that it lags behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from definition_server.cli.embedded_postgres import EmbeddedPostgres, free_port

READY_SECONDS = 30.0
POLL_SECONDS = 0.05


@contextmanager
def standby_behind(primary: EmbeddedPostgres, url: str) -> Iterator[str]:
    """Start a standby of ``primary`` whose replay is paused. Returns its URL for the database of ``url``."""
    assert primary.directory is not None
    owner = primary.directory.stat()
    user = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    programs = primary.psql_program.parent
    root = Path(tempfile.mkdtemp(prefix="avap-standby-"))
    os.chown(root, owner.st_uid, owner.st_gid)
    port = free_port()
    try:
        source = ["-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres"]
        subprocess.run(
            [programs / "pg_basebackup", *source, "-D", root / "data", "-R", "-X", "stream", "-c", "fast", "--no-sync"],
            cwd=root,
            check=True,
            capture_output=True,
            timeout=READY_SECONDS,
            **user,
        )
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "hot_standby": "on"}
        with (root / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", root / "data", "-p", str(port)]
                + [part for name, value in options.items() for part in ("-c", f"{name}={value}")],
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **user,
            )
        try:
            here = urlsplit(url)._replace(netloc=f"postgres@127.0.0.1:{port}").geturl()
            _stop_replay(here, root / "log")
            yield here
        finally:
            server.terminate()
            server.send_signal(2)  # a "fast" shutdown, which does not wait for sessions
            server.wait(READY_SECONDS)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _stop_replay(url: str, log: Path) -> None:
    """Wait until the standby answers, and pause its replay."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=2) as connection:
                connection.execute("SELECT pg_wal_replay_pause()")
                return
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                told = log.read_text(errors="replace")[-2000:]
                raise TimeoutError(f"the standby does not answer: {error}\n{told}") from error
            time.sleep(POLL_SECONDS)
