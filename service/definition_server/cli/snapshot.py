"""``definition-server snapshot`` inspects a snapshot file. This module also prints definitions for ``get``."""

from __future__ import annotations

import base64
import json
import math
import stat
import time
from datetime import UTC, datetime
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.segment import Segments
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from definition_server.catalog.definition import Definition
from definition_server.catalog.layout import SnapshotError
from definition_server.catalog.signing import UNSIGNED, SignatureError, payload_of
from definition_server.catalog.snapshot import Snapshot
from definition_server.catalog.wire import WireError
from definition_server.cli.exits import (
    CommandFailed,
    Exit,
    no_traceback,
    on_terminal,
    print_facts,
    print_json,
    visible,
)
from definition_server.control_plane.store import without_mac

_DEEPEST_INTERFACE = 20
"""The most levels of nesting. A real interface has two levels; Python's JSON writer fails at some hundreds of
levels."""


@click.group()
def snapshot() -> None:
    """Inspect snapshot files, such as the last-known-good snapshot in SNAPSHOT_DIR."""


@snapshot.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--list", "listing", is_flag=True, help="Print the definitions in place of the facts (JSON: with them).")
@click.option("--name", help="Print the definition of this name in place of the facts.")
@no_traceback()
def inspect(file: Path, as_json: bool, listing: bool, name: str | None) -> None:
    """Verify every octet of the snapshot in FILE, and print its content.

    Exit codes: 0 undamaged, 1 no file or damaged, 3 no definition called NAME.
    """
    if listing and name is not None:
        raise click.UsageError("--list and --name exclude each other.")
    opened = open_verified(file)
    try:
        if name is not None:
            _print_one(opened, name, file, as_json=as_json)
        elif as_json:
            print_json(_facts(opened) | ({"definitions": _listing(opened)} if listing else {}))
        elif listing:
            _print_listing(_listing(opened))
        else:
            _print_facts(opened)
    except WireError as error:
        # The checksum is right, so the file was not damaged. A program with a bug, or an attacker, has written it.
        raise CommandFailed(f"{file} is not usable: definitions: {error}", Exit.FAILED) from None


def open_verified(path: Path) -> Snapshot:
    """The snapshot in a file, after a check of every octet.

    Raises:
        CommandFailed: if the file cannot be read or a check fails.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block, a device may have no end
            raise CommandFailed(f"cannot read {path}: it is not a regular file", Exit.FAILED)
        with path.open("rb") as file:
            # The server replaces its file by renaming, so the mapped file does not change. An empty file cannot be
            # mapped.
            octets = mmap(file.fileno(), 0, access=ACCESS_READ) if path.stat().st_size else b""
        opened = Snapshot(without_mac(octets))
        opened.verify()
    except SnapshotError as error:
        raise CommandFailed(f"{path} is not usable: {error}", Exit.FAILED) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandFailed(f"cannot read {path}: {reason}", Exit.FAILED) from None
    return opened


def _facts(opened: Snapshot) -> dict[str, Any]:
    footer = opened.footer
    created = footer.created_at_ns / 1e9
    signed = footer.key_id != UNSIGNED
    return {
        "generation": footer.generation,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds"),
        "age_seconds": round(time.time() - created, 3),
        "count": footer.count,
        "bytes": opened.size,
        "body_bytes": footer.body_length,
        "version_hash": opened.version_hash,
        "signed": signed,
        "key_id": footer.key_id.hex() if signed else None,
    }


def _print_facts(opened: Snapshot) -> None:
    facts = _facts(opened)
    print_facts(
        [
            ("generation", str(facts["generation"])),
            ("created at", f"{facts['created_at']} ({_age(facts['age_seconds'])})"),
            ("definitions", f"{facts['count']:,}"),
            ("bytes", f"{facts['bytes']:,}"),
            ("body bytes", f"{facts['body_bytes']:,}"),
            ("version hash", facts["version_hash"]),
            ("signed", f"yes (key id {facts['key_id']})" if facts["signed"] else "no"),
            ("verified", "whole and undamaged"),
        ]
    )


def _age(seconds: float) -> str:
    if seconds < 0:
        return "in the future: a clock is wrong"
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def _listing(opened: Snapshot) -> list[dict[str, Any]]:
    return [{"name": each.name, "type": each.type, "code_bytes": len(each.code), "hash": each.hash} for each in opened]


def _print_listing(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    if not on_terminal():
        click.echo("name\ttype\tcode bytes\thash")
        for row in rows:
            click.echo("\t".join(visible(str(value)) for value in row.values()))
        return
    table = Table(box=None)
    table.add_column("name", overflow="fold")
    table.add_column("type", overflow="fold")
    table.add_column("code bytes", justify="right")
    table.add_column("hash", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(str(value))) for value in row.values()))
    Console().print(table)


def _print_one(opened: Snapshot, name: str, file: Path, *, as_json: bool) -> None:
    try:
        definition = opened.get(name)
    except UnicodeEncodeError:
        raise click.UsageError("--name is not UTF-8 text.") from None
    if definition is None:
        raise CommandFailed(f"{file} holds no definition called '{visible(name)}'", Exit.NOT_FOUND)
    if as_json:
        print_json(definition_value(definition))
    else:
        print_definition(definition)


def definition_value(definition: Definition) -> dict[str, Any]:
    """``definition`` for JSON. ``code`` is as served: source as text; a signed package or other octets in base64.

    ``id`` is None if no id is served. Bytecode is in base64; without bytecode its fields are missing.
    """
    signed, _ = _source_of(definition)
    encoding = "base64" if signed or not _is_utf8(definition.code) else "utf-8"
    octets = base64.b64encode(definition.code) if encoding == "base64" else definition.code
    bytecode = base64.b64encode(definition.avbc_code).decode()
    return {
        "id": definition.internal_id or None,
        "name": definition.name,
        "type": definition.type,
        "interface": interface_value(definition.interface_json),
        "hash": definition.hash,
        "signed": signed,
        "code_encoding": encoding,
        "code": octets.decode(),
    } | ({"avbc_version": definition.avbc_version, "avbc_code": bytecode} if bytecode else {})


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True


def interface_value(text: str) -> list[Any] | str:
    """``text`` as parsed JSON, if it is an array that can be written as JSON again; otherwise ``text`` itself."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) and _nests_at_most(_DEEPEST_INTERFACE, value) else text


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a JSON number")
    return value


def _nests_at_most(levels: int, value: object) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(levels > 0 and _nests_at_most(levels - 1, child) for child in children)


def print_definition(definition: Definition) -> None:
    """Print ``definition`` in readable form: coloured on a terminal, plain text elsewhere.

    For a signed package its payload is shown. The signature is not verified.
    """
    signed, source = _source_of(definition)
    facts = [
        ("name", visible(definition.name)),
        ("type", visible(definition.type)),
        ("hash", visible(definition.hash)),
        ("code", f"{len(source):,} bytes, {'signed' if signed else 'not signed'}"),
    ]
    if definition.internal_id:
        facts.insert(0, ("id", str(definition.internal_id)))
    if definition.avbc_code:
        facts.append(("bytecode", f"{len(definition.avbc_code):,} bytes, version {definition.avbc_version}"))
    items = _interface_rows(definition.interface_json)
    code = source.decode(errors="backslashreplace")
    if not on_terminal():
        interface = ", ".join(f"{item} ({kind})" if kind else item for item, kind in items) or "none"
        print_facts([*facts, ("interface", interface)])
        click.echo(f"\n{code}", nl=not code.endswith("\n"))
        return
    console = Console()
    for label, value in facts:
        console.print(Text.assemble((f"{label}: ", "bold"), value), soft_wrap=True)
    if items:
        table = Table("item", "type", title="interface", title_justify="left")
        for item, kind in items:
            table.add_row(Text(item), Text(kind))
        console.print(table)
    else:
        console.print(Text.assemble(("interface: ", "bold"), "none"))
    shown = visible(code, keep="\n\t")
    # Segments are printed as they are: rich's own layout would break long lines, cut them off or replace tabs.
    colours = Syntax(shown, "python", theme="ansi_dark", background_color="default", tab_size=0)
    console.print(Segments(colours.highlight(shown).render(console)), soft_wrap=True)


def _source_of(definition: Definition) -> tuple[bool, bytes]:
    """Whether the code is a signed package; and the source: the package's payload, or the code itself."""
    try:
        return True, payload_of(definition.code)
    except SignatureError:
        return False, definition.code


def _interface_rows(text: str) -> list[tuple[str, str]]:
    """The pair (item, type) of each entry. An entry of another form, or an interface that is not an array, is shown as
    it is."""
    value = interface_value(text)
    if isinstance(value, str):
        return [(visible(value), "")]
    rows = []
    for entry in value:
        if isinstance(entry, dict) and isinstance(entry.get("item"), str):
            rows.append((visible(entry["item"]), visible(str(entry.get("type", "")))))
        else:
            rows.append((json.dumps(entry), ""))
    return rows
