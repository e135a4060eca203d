"""``definition-server validate``: reads the table as a server would, and reports the findings, without serving it."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from typing import Any

import click

from definition_server.catalog.builder import CatalogTooLarge, SnapshotBuilder
from definition_server.catalog.gate import Gate
from definition_server.catalog.signing import Signer
from definition_server.catalog.validation import Findings
from definition_server.cli.exits import (
    CommandFailed,
    Exit,
    no_traceback,
    print_facts,
    print_json,
    server_settings_or_exit,
)
from definition_server.control_plane.checker import Checker
from definition_server.control_plane.row_gate import RowGate
from definition_server.control_plane.source import ReadLimits, SourceError
from definition_server.observability.logs import log_warnings_to_stderr
from definition_server.settings import Settings


@dataclass(frozen=True, slots=True)
class _Report:
    findings: Findings
    count: int
    version_hash: str
    body_bytes: int
    empty_refused: bool

    @property
    def clean(self) -> bool:
        return not (self.findings.unserved or self.findings.suspect or self.findings.unchecked or self.empty_refused)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@no_traceback()
def validate(as_json: bool) -> None:
    """Read the table of DATABASE_URL as a server would, and report rows that it would not serve or that look wrong.

    Nothing is served or written, and API_KEY is not needed. Exit codes: 0 every row is served and none is suspect,
    1 there are findings, 69 the database cannot be read.
    """
    settings = server_settings_or_exit(API_KEY="unused", API_KEYS=None)
    log_warnings_to_stderr()
    try:
        report = asyncio.run(_report(settings))
    except SourceError as error:
        raise CommandFailed(f"the database cannot be read: {error}", Exit.UNAVAILABLE) from None
    except CatalogTooLarge as error:
        raise CommandFailed(f"the catalogue cannot be served: {error}", Exit.FAILED) from None
    if as_json:
        print_json(_value(report))
    else:
        _print(report)
    if not report.clean:
        raise click.exceptions.Exit(Exit.FAILED)


async def _report(settings: Settings) -> _Report:
    from definition_server.control_plane.postgres import PostgresSource  # the other commands need no psycopg

    key = settings.avap_internal_key
    builder = SnapshotBuilder(None if key is None else Signer(key.get_secret_value()))
    source = PostgresSource(
        settings.database_url.get_secret_value(),
        connect_timeout=settings.connect_timeout_seconds,
        statement_timeout=settings.statement_timeout_seconds,
        limits=ReadLimits(settings.max_definition_bytes, settings.max_catalog_bytes),
    )
    try:
        async with source.read() as reading:
            async for batch in reading.batches():
                builder.add(batch)
    finally:
        await source.close()
    await _judge(builder, settings)
    footer = builder.build(generation=1, created_at_ns=time.time_ns()).footer
    return _Report(
        findings=builder.findings,
        count=footer.count,
        version_hash=footer.version_hash.hex(),
        body_bytes=footer.body_length,
        empty_refused=footer.count == 0 and not settings.allow_empty_catalog,
    )


async def _judge(builder: SnapshotBuilder, settings: Settings) -> None:
    """Judge each row like a server that has no last good catalogue."""
    gate = RowGate(
        Gate(settings.gate_code, settings.gate_interface), Checker(settings.jail), first_seconds=math.inf, logs=False
    )
    try:
        await gate.apply(builder, None)
    finally:
        await gate.close()


def _value(report: _Report) -> dict[str, Any]:
    found = report.findings
    return {
        "source_rows": found.source_rows,
        "count": report.count,
        "version_hash": report.version_hash,
        "body_bytes": report.body_bytes,
        "unserved": {str(reason): count for reason, count in found.unserved.most_common()},
        "suspect": {str(reason): count for reason, count in found.suspect.most_common()},
        "unchecked": found.unchecked,
        "examples": {str(reason): rows for reason, rows in found.examples.items()},
        "empty_catalog_refused": report.empty_refused,
        "clean": report.clean,
    }


def _print(report: _Report) -> None:
    found = report.findings
    print_facts(
        [
            ("source rows", f"{found.source_rows:,}"),
            ("servable definitions", f"{report.count:,}"),
            ("body bytes", f"{report.body_bytes:,}"),
            ("version hash", report.version_hash),
        ]
    )
    for title, counts in (("not served", found.unserved), ("served, but suspect", found.suspect)):
        click.echo(f"\n{title}: {counts.total():,}")
        for reason, count in counts.most_common():
            click.echo(f"  {reason}: {count:,}")
            for example in found.examples[reason]:
                click.echo(f"    {example}")
            hidden = count - len(found.examples[reason])
            if hidden:
                click.echo(f"    … and {hidden:,} more")
    if found.unchecked:
        click.echo(f"\nnot checked, because no checker process can be started: {found.unchecked:,}")
    if report.empty_refused:
        click.echo("\nA server refuses an empty catalogue and keeps its last good one (ALLOW_EMPTY_CATALOG=true).")
