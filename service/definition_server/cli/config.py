"""``definition-server config``: the effective settings."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from definition_server.cli.exits import misspelled, on_terminal, server_settings_or_exit
from definition_server.cli.reference import settings_page
from definition_server.environment import effective
from definition_server.settings import Settings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--reference", is_flag=True, help="Print the reference page of all settings (Markdown).")
def config(as_json: bool, reference: bool) -> None:
    """Print the effective settings, secrets masked."""
    if reference:
        click.echo(settings_page(), nl=False)
        return
    settings = server_settings_or_exit()
    values = effective(settings)
    from definition_server.control_plane.postgres import database_address  # `--reference` needs no psycopg

    address = database_address(settings.database_url.get_secret_value())
    if address is not None:
        values["DATABASE_URL"] = address.url()
    for line in misspelled(Settings):
        click.echo(f"Note: {line}", err=True)
    console = Console()
    if as_json:
        console.print_json(data=values)
        return
    if not on_terminal():  # in a pipe, no value may be cut off at a terminal's width
        for variable, value in values.items():
            click.echo(f"{variable:<28} {'unset' if value is None else value}")
        return
    table = Table(box=None)
    table.add_column("variable", overflow="fold")
    table.add_column("value", overflow="fold")
    for variable, value in values.items():
        table.add_row(variable, "[dim]unset[/dim]" if value is None else value)
    console.print(table)
