"""``definition-server``: the command line."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from definition_server import __version__
from definition_server.cli.exits import server_settings_or_exit
from definition_server.cli.reference import settings_epilog
from definition_server.inherited import prepare
from definition_server.settings import Settings

_COMMANDS = {
    "capacity": "definition_server.cli.capacity",
    "config": "definition_server.cli.config",
    "demo": "definition_server.cli.demo",
    "get": "definition_server.cli.client",
    "health": "definition_server.cli.client",
    "proto": "definition_server.cli.proto",
    "snapshot": "definition_server.cli.snapshot",
    "sync": "definition_server.cli.client",
    "validate": "definition_server.cli.validate",
}
"""Command → the module that defines a function of that name."""


class _Commands(click.Group):
    """Imports the module of a command when it is run, so that ``serve`` starts without gRPC and terminal libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="definition-server")
def cli() -> None:
    """Serve AVAP command definitions from PostgreSQL over gRPC, and inspect what is served."""


@cli.command(epilog=settings_epilog(Settings))
def serve() -> None:
    """Serve the catalogue until SIGTERM or Ctrl-C.

    Signals: SIGHUP syncs at once and reads secrets from their files again; SIGUSR2 replaces the workers one by one.
    """
    settings = server_settings_or_exit()
    from definition_server.control_plane.master import run_master  # after the settings have been validated

    sys.exit(run_master(settings))


def main() -> None:
    """Entry point of the console script."""
    prepare()
    cli(prog_name="definition-server")


if __name__ == "__main__":
    main()
