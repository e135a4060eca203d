"""``definition-server demo``: the server on one machine, with its own PostgreSQL and a sample catalogue."""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import signal
import socket
import sys
from typing import NoReturn

import click
from pydantic import SecretStr
from rich.console import Console

from definition_server.api_keys import METADATA_KEY
from definition_server.catalog.restore_sql import CREATE_TABLE_SQL
from definition_server.cli.embedded_postgres import (
    EmbeddedPostgres,
    PostgresBinariesNotFound,
    PostgresStartFailed,
    PsqlFailed,
    free_port,
)
from definition_server.cli.exits import CommandFailed, Exit, settings_or_exit
from definition_server.cli.reference import settings_epilog
from definition_server.cli.sample_catalogue import COLUMNS, as_csv, load_sample_catalogue
from definition_server.environment import forget_libpq_variables
from definition_server.inherited import MASTERS, early_signals
from definition_server.settings import Settings

_KEY_BYTES = 12
_DEFAULTS = {
    "APP_ENV": "development",
    "DRAIN_WAIT_SECONDS": "0",
    "HOST": "127.0.0.1",
    "SYNC_INTERVAL_SECONDS": "5",
}
"""The values of settings that the environment does not set: readable logs, no access from other machines, and a short
interval."""


@click.command(
    epilog=settings_epilog(Settings, defaults=_DEFAULTS | {"DATABASE_URL": None, "API_KEY": "made at each start"})
)
def demo() -> None:
    """Start an embedded PostgreSQL with a sample catalogue and serve it until Ctrl-C.

    Reads PORT, METRICS_PORT, API_KEY, WORKERS and every other variable from the environment, except DATABASE_URL. With
    SNAPSHOT_DIR or CONTROL_SOCKET, the operator's commands (`status`, `pin` and others) work on it too.
    """
    # The settings are read before PostgreSQL is started, so that an invalid environment or a port that is in use is
    # reported at once.
    settings = _settings()
    _check_ports(settings)
    forget_libpq_variables()
    commands = load_sample_catalogue()
    for number in MASTERS:
        signal.signal(number, _leave)
    if early_signals.take():
        sys.exit(0)
    console = Console(highlight=False, soft_wrap=True)
    postgres = EmbeddedPostgres(password=secrets.token_hex(_KEY_BYTES))
    try:
        postgres.start()
        postgres.psql(CREATE_TABLE_SQL)
        copy = rf"\copy obex_dapl_functions({','.join(COLUMNS)}) from pstdin with (format csv, null '\N')"
        postgres.psql(copy, stdin=as_csv(commands))
        settings = settings.model_copy(update={"database_url": SecretStr(postgres.url)})
        console.print(_introduction(settings, postgres, len(commands)))
        code = _serve(settings)
    except (PostgresBinariesNotFound, PostgresStartFailed, PsqlFailed) as error:
        raise CommandFailed(f"the demo's PostgreSQL: {error}", Exit.UNAVAILABLE) from None
    finally:  # not a `with`: a signal between the start and the block would leave PostgreSQL's directory undeleted
        _ignore_signals()
        postgres.stop()
    try:
        console.print("The demo has ended; its PostgreSQL and its data are gone.")
        sys.stdout.flush()
    except OSError:  # the terminal is gone: without this, Python fails again at the exit (code 120)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _leave(number: int, _: object) -> NoReturn:
    """End the demo and its PostgreSQL. Further signals are ignored meanwhile."""
    _ignore_signals()
    sys.exit(0)


def _ignore_signals() -> None:
    for number in MASTERS:
        signal.signal(number, signal.SIG_IGN)


def _serve(settings: Settings) -> int:
    from definition_server.control_plane.master import run_master

    return run_master(settings, demonstration=True)


def _settings() -> Settings:
    """The demo's settings, still without the database's address. Port 0 is replaced by a free port, which is printed
    later."""
    defaults = _DEFAULTS | {"API_KEY": secrets.token_hex(_KEY_BYTES)}
    settings = settings_or_exit(Settings, defaults=defaults, DATABASE_URL="postgresql://demo")
    free = {name: free_port() for name in ("port", "metrics_port") if getattr(settings, name) == 0}
    return settings.model_copy(update=free)


def _check_ports(settings: Settings) -> None:
    """End the command if a port is in use: otherwise it would print how to call a server that does not exist."""
    from definition_server.control_plane.listener import reason_text

    address = (settings.metrics_host or settings.host, settings.metrics_port)
    for host, port, variable in ((settings.host, settings.port, "PORT"), (*address, "METRICS_PORT")):
        host = host.removeprefix("[").removesuffix("]")
        try:
            socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise CommandFailed(reason_text(host, port, variable, error), Exit.UNAVAILABLE) from None


def _line_of_status(settings: Settings, program: str) -> str:
    """The command that shows this server's status if it has a control socket; otherwise the way to configure one."""
    if (path := settings.control_path()) is None:
        return "  (with SNAPSHOT_DIR=DIRECTORY before the demo, status, pin and the other operator's commands work)"
    return f"  CONTROL_SOCKET={shlex.quote(str(path))} {program} status"


def _signing(settings: Settings) -> str:
    if settings.avap_internal_key is not None:
        return "on, with AVAP_INTERNAL_KEY"
    return "off: set AVAP_INTERNAL_KEY before you connect an AVAP language server"


def _introduction(settings: Settings, postgres: EmbeddedPostgres, count: int) -> str:
    """The addresses, the key, and commands to try."""
    key = next(iter(settings.keys_by_id().values()))
    environment = f"API_KEY={shlex.quote(key)} PORT={settings.port}"
    program = shlex.quote(sys.argv[0]) if "/" in sys.argv[0] else "definition-server"
    update = "UPDATE obex_dapl_functions SET code = code || E'\\n# changed' WHERE name = 'if'"
    return "\n".join(
        [
            "",
            "[bold]AVAP Definition Server, demo[/bold]",
            f"  gRPC      {settings.host}:{settings.port}, metadata {METADATA_KEY}: {key}",
            f"  status    http://{settings.host}:{settings.metrics_port}/ in a browser; also /metrics and /readyz",
            f"  catalogue {count} commands in PostgreSQL at {postgres.url}",
            f"  signing   {_signing(settings)}",
            "",
            "In another terminal:",
            f"  {environment} {program} get if",
            f"  {environment} {program} fetch",
            f"  PORT={settings.port} {program} health",
            _line_of_status(settings, program),
            f'  {shlex.quote(str(postgres.psql_program))} {postgres.url} -c "{update}"',
            f"  (the change is served within {settings.sync_interval_seconds:g} s)",
            "",
            "Ctrl-C ends it.",
            "",
        ]
    )
