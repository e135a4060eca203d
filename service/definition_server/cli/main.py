"""``definition-server``: the command line."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module
from shutil import get_terminal_size
from typing import Any

import click

from definition_server import __version__
from definition_server.cli import lasting_imports
from definition_server.cli.exits import readable_errors, server_settings_or_exit
from definition_server.cli.reference import settings_epilog
from definition_server.environment import end_with_the_exit_code, grpc_without_lines_of_its_own
from definition_server.settings import Settings

_COMMANDS = {
    "accept": "definition_server.cli.control",
    "capacity": "definition_server.cli.capacity",
    "config": "definition_server.cli.config",
    "demo": "definition_server.cli.demo",
    "diff": "definition_server.cli.control",
    "export": "definition_server.cli.export",
    "fetch": "definition_server.cli.client",
    "get": "definition_server.cli.client",
    "health": "definition_server.cli.client",
    "history": "definition_server.cli.control",
    "pin": "definition_server.cli.control",
    "proto": "definition_server.cli.proto",
    "roll": "definition_server.cli.control",
    "snapshot": "definition_server.cli.snapshot",
    "status": "definition_server.cli.status",
    "sync": "definition_server.cli.control",
    "unpin": "definition_server.cli.control",
    "validate": "definition_server.cli.validate",
}
"""Command → the module that defines a function of that name."""

_FORMER_SYNC = frozenset(("--out", "--host", "--port", "--ca-file", "--client-cert-file", "--client-key-file"))
"""Options of ``fetch``, by which a call of its former name ``sync`` is recognized."""


_CLICKS_LEAST_COLUMNS = 52
"""The columns of a terminal below which click still writes lines of 50 characters."""


class _Commands(click.Group):
    """Imports the module of a command when it is run, so that ``serve`` starts without gRPC and terminal libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_COMMANDS])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[:1] == ["sync"] and any(arg.partition("=")[0] in _FORMER_SYNC for arg in args[1:]):
            click.echo("Note: the command that downloads a catalogue is `fetch` now.", err=True)
            args = ["fetch", *args[1:]]
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            close = get_close_matches(args[0].lower(), self.list_commands(ctx), n=3)
            meant = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{meant}")
        return super().resolve_command(ctx, args)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        columns = get_terminal_size().columns
        if columns < _CLICKS_LEAST_COLUMNS:
            extra.setdefault("terminal_width", max(20, columns - 2))
        with readable_errors():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with readable_errors():
            return super().invoke(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        with grpc_without_lines_of_its_own():
            command: click.Command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="definition-server")
def cli() -> None:
    """Serve AVAP command definitions from PostgreSQL over gRPC, and inspect them."""


@cli.command(epilog=settings_epilog(Settings))
def serve() -> None:
    """Serve the catalogue until SIGTERM or Ctrl-C.

    Signals: SIGHUP syncs at once and reads secrets from their files again; SIGUSR2 replaces the workers one by one.
    """
    settings = server_settings_or_exit()
    with lasting_imports():
        from definition_server.control_plane.master import run_master  # after the settings have been validated

    sys.exit(run_master(settings))


def main() -> None:
    """Run the command line in a process that `prepare` has begun."""
    end_with_the_exit_code()
    cli(prog_name="definition-server")


if __name__ == "__main__":
    main()
