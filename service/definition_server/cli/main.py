"""``definition-server``: the command line."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.table import Table

from definition_server import __version__
from definition_server.cli.client import get, health, sync
from definition_server.cli.demo import demo
from definition_server.cli.exits import settings_or_exit
from definition_server.cli.reference import settings_epilog, settings_page
from definition_server.cli.snapshot import snapshot
from definition_server.cli.validate import validate
from definition_server.settings import Settings, effective


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="definition-server")
def cli() -> None:
    """Serve AVAP command definitions from PostgreSQL over gRPC, and look at what is served."""


@cli.command(epilog=settings_epilog(Settings))
def serve() -> None:
    """Serve the catalogue until SIGTERM or Ctrl-C.

    Signals: SIGHUP syncs at once (and re-reads secrets from files), SIGUSR2 replaces the workers one by one.
    """
    settings = settings_or_exit(Settings)
    from definition_server.control_plane.master import run_master  # the client commands need no psycopg

    sys.exit(run_master(settings))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--reference", is_flag=True, help="Print the reference page of all settings (Markdown).")
def config(as_json: bool, reference: bool) -> None:
    """Print the effective settings, secrets masked."""
    if reference:
        click.echo(settings_page(), nl=False)
        return
    values = effective(settings_or_exit(Settings))
    console = Console()
    if as_json:
        console.print_json(data=values)
        return
    table = Table("variable", "value", box=None)
    for variable, value in values.items():
        table.add_row(variable, "[dim]unset[/dim]" if value is None else value)
    console.print(table)


for command in (demo, get, sync, health, snapshot, validate):
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="definition-server")


if __name__ == "__main__":
    main()
