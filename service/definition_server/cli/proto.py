"""``definition-server proto``: the folder of the contract, from which the code of a client is generated."""

from __future__ import annotations

from importlib.resources import as_file, files

import click


@click.command()
def proto() -> None:
    """Print the folder that holds the gRPC contract, avap.proto.

    For example: protoc -I "$(definition-server proto)" --java_out=. avap.proto
    """
    # Wheels are installed as files, so the path stays valid after the context.
    with as_file(files("definition_server") / "proto") as folder:
        click.echo(folder)
