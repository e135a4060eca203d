"""SQL that makes the table ``obex_dapl_functions`` serve one catalogue again, octet by octet.

The script is one transaction. It puts the rows into a temporary table, and makes the real one agree with it: rows that
are not part of the catalogue are deleted, rows that differ are updated, so that columns that are not served
(description, logic …) keep their values, and missing rows are inserted with their ids. A row whose id is not known gets
an id above all others, in the catalogue's order. A script that was cut off has no COMMIT, and changes nothing. At its
end the script compares the table with the catalogue: if a trigger or a rule has kept or written something else, the
script fails, and changes nothing either.

If the catalogue has bytecode, the optional table ``avap_bytecode`` is made to agree with it in the same transaction:
bytecode of the catalogue is written there, with the hash of the restored code. Bytecode that the catalogue lacks, but
that the server would serve, stays in its row; its hash is removed, so that it is no longer served. A catalogue without
bytecode may come from a server that does not read that table; the table then stays as it is.

A column may have any type whose text the server serves, even a composite type. Some settings decide how a value is
written as text. The script sets them to the values that the server reads with: with other values a row would differ
from itself.

Text is written as a string constant of standard SQL, or, if it holds a backslash or a control character, as an escape
string (PostgreSQL 4.1.2.2): neither depends on a setting of the server, and no tool on the way can change a line end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from definition_server.catalog import wire
from definition_server.catalog.signing import SignatureError, payload_of

BATCH_OCTETS = 64 * 1024
"""The largest size of one INSERT, unless a single row is larger."""

CREATE_TABLE_SQL = """\
CREATE TABLE IF NOT EXISTS obex_dapl_functions (
    id SERIAL PRIMARY KEY,
    name VARCHAR(100),
    interface TEXT,
    description TEXT,
    type VARCHAR(50),
    logic BOOLEAN,
    componenttype VARCHAR(50),
    service VARCHAR(50),
    command VARCHAR(50),
    code TEXT
)"""
"""Makes the table as deployments have it."""

_NAME, _TYPE, _INTERFACE, _CODE, _ID = 1, 2, 3, 4, 6
_TEXTS = (_NAME, _TYPE, _INTERFACE, _CODE)
_SPECIAL = re.compile(r"[\\\x00-\x08\x0b-\x1f\x7f]")
_ESCAPES = {"\\": "\\\\", "\r": "\\r"}


class RestoreError(ValueError):
    """A definition that no row can hold. The message names the definition."""


class TableRow(NamedTuple):
    """The served columns of a row."""

    id: int | None
    """None if it is not known."""
    name: str
    type: str
    interface: str
    code: str
    bytecode: bytes = b""
    """Empty if the catalogue has no bytecode of this command."""
    bytecode_version: int = 0


def row_of(message: memoryview) -> TableRow:
    """The row from which a serialized ``CommandResponse`` was made. Signed code is unpacked; the signature is not
    verified.

    Raises:
        RestoreError: if no row can hold it.
        WireError: if ``message`` is not a ``CommandResponse``.
    """
    texts: dict[int, bytes] = {}
    numbers: dict[int, int] = {}
    for number, value, content in wire.fields(message):
        if number in (_ID, wire.AVBC_VERSION):
            numbers[number] = wire.int32(value)
        elif number in (*_TEXTS, wire.AVBC_CODE):
            texts[number] = bytes(content)
    code = texts.get(_CODE, b"")
    with suppress(SignatureError):  # the code is not signed
        code = payload_of(code)
    name = texts.get(_NAME, b"")
    columns = (name, texts.get(_TYPE, b""), texts.get(_INTERFACE, b""), code)
    try:
        decoded = [column.decode() for column in columns]
    except UnicodeDecodeError:
        raise RestoreError(f"{_shown(name)}: it is not UTF-8, so it cannot come from a row") from None
    if any("\0" in column for column in decoded):
        raise RestoreError(f"{_shown(name)}: it holds a zero octet, which a text of PostgreSQL cannot hold")
    text, kind, interface, source = decoded
    row = TableRow(numbers.get(_ID) or None, text, kind, interface, source)
    return row._replace(bytecode=texts.get(wire.AVBC_CODE, b""), bytecode_version=numbers.get(wire.AVBC_VERSION, 0))


def _shown(name: bytes) -> str:
    return repr(name[:80].decode(errors="replace"))


def script(rows: Iterable[TableRow], *, version_hash: str) -> Iterator[str]:
    """The script, in pieces of bounded size."""
    yield _HEAD.format(version_hash=re.sub(r"[^0-9a-f]", "", version_hash), create_table=CREATE_TABLE_SQL)
    batch: list[str] = []
    bytecode: list[str] = []
    octets = number = with_bytecode = 0
    for number, row in enumerate(rows, 1):
        row_id = "NULL" if row.id is None else str(row.id)
        columns = ", ".join(map(literal, (row.name, row.type, row.interface, row.code)))
        batch.append(f"({number}, {row_id}, {columns})")
        octets += len(batch[-1])
        if row.bytecode:
            with_bytecode += 1
            bytecode.append(f"({number}, '\\x{row.bytecode.hex()}', {row.bytecode_version})")
            octets += len(bytecode[-1])
        if octets >= BATCH_OCTETS:
            yield _insert("restored", batch) + _insert("restored_bytecode", bytecode)
            batch, bytecode, octets = [], [], 0
    yield _insert("restored", batch) + _insert("restored_bytecode", bytecode)
    yield _TAIL.format(rows=number)
    yield _BYTECODE.format(rows=with_bytecode) if with_bytecode else _NO_BYTECODE
    yield "COMMIT;\n"


def _insert(table: str, batch: list[str]) -> str:
    return f"INSERT INTO {table} VALUES\n" + ",\n".join(batch) + ";\n" if batch else ""


def literal(text: str) -> str:
    """``text`` as a constant of SQL, under ``standard_conforming_strings``."""
    quoted = text.replace("'", "''")
    if not _SPECIAL.search(quoted):
        return f"'{quoted}'"
    escaped = _SPECIAL.sub(lambda found: _ESCAPES.get(found[0]) or f"\\x{ord(found[0]):02x}", quoted)
    return f"E'{escaped}'"


_HEAD = """\
-- Makes obex_dapl_functions serve this version again:
-- {version_hash}
-- Rows that are no part of it are deleted. For example: psql -v ON_ERROR_STOP=1 -f THIS_FILE "$ADMIN_DATABASE_URL"
-- The table is the one that the session's search_path finds; where it finds none, one is made.
BEGIN;
SET TRANSACTION READ WRITE;
SET LOCAL client_encoding = 'UTF8';
SET LOCAL standard_conforming_strings = on;
SET LOCAL row_security = off;
SET LOCAL bytea_output = 'hex';
SET LOCAL DateStyle = 'ISO, YMD';
SET LOCAL IntervalStyle = 'postgres';
SET LOCAL TimeZone = 'UTC';
SET LOCAL extra_float_digits = 1;
SET LOCAL xmlbinary = 'base64';
DO $restore$
DECLARE
    elsewhere TEXT;
BEGIN
    SELECT min(relnamespace::regnamespace::TEXT) INTO elsewhere FROM pg_class WHERE relname = 'obex_dapl_functions';
    IF to_regclass('obex_dapl_functions') IS NULL AND elsewhere IS NOT NULL THEN
        RAISE WARNING 'a new table obex_dapl_functions is made: search_path lacks %, which has one', elsewhere;
    END IF;
END
$restore$;
{create_table};
LOCK TABLE obex_dapl_functions IN SHARE ROW EXCLUSIVE MODE;
CREATE TEMPORARY TABLE restored (number BIGINT, id BIGINT, name TEXT COLLATE "C", type TEXT, interface TEXT, code TEXT)
    ON COMMIT DROP;
CREATE TEMPORARY TABLE restored_bytecode (number BIGINT, code BYTEA, version INTEGER) ON COMMIT DROP;
"""

_TAIL = """\
-- {rows} rows.
ANALYZE restored;
-- The columns may have other types that hold the same text: character types, enums, json, and bytea as UTF-8.
DO $restore$
DECLARE
    -- The number in a column of another type; NULL if it holds none.
    old_id TEXT := $$CASE WHEN old.id::TEXT ~ '^\\s*[+-]?[0-9]+(\\.0*)?\\s*$' THEN old.id::TEXT::NUMERIC END$$;
    old_name TEXT; restored_name TEXT; old_row TEXT; restored_row TEXT; assigned TEXT; columns TEXT; inserted TEXT;
    same TEXT; others BIGINT; missing BIGINT;
BEGIN
    -- Of each column: the text that it holds, that text of a restored row, and the value of a restored row.
    WITH attributes AS (
        SELECT attname AS name,
            CASE WHEN octets THEN format('encode(old.%I, ''escape'')', attname) ELSE format('old.%I::TEXT', attname)
            END AS held,
            CASE WHEN octets THEN format('encode(convert_to(restored.%I, ''UTF8''), ''escape'')', attname)
            ELSE format('restored.%I', attname) END AS wanted,
            CASE WHEN octets THEN format('convert_to(restored.%I, ''UTF8'')', attname)
            ELSE format('restored.%I::%s', attname, format_type(atttypid, -1)) END AS value,
            attgenerated = '' AS can_be_set
        FROM (SELECT *, atttypid = 'bytea'::regtype AS octets FROM pg_attribute) AS every
        WHERE attrelid = 'obex_dapl_functions'::regclass AND attname IN ('name', 'type', 'interface', 'code'))
    SELECT max(held) FILTER (WHERE name = 'name') || ' COLLATE "C"',
        max(wanted) FILTER (WHERE name = 'name') || ' COLLATE "C"',
        -- A type or an interface that is NULL or empty is served as its default, so it stays as it is.
        string_agg(CASE name
            WHEN 'type' THEN format('coalesce(nullif(%s, ''''), ''function'')', held)
            WHEN 'interface' THEN format('coalesce(nullif(%s, ''''), ''[]'')', held)
            ELSE held END || ' COLLATE "C"', ', ' ORDER BY name) FILTER (WHERE name <> 'name'),
        string_agg(CASE name
            WHEN 'type' THEN format('coalesce(nullif(%s, ''''), ''function'')', wanted)
            WHEN 'interface' THEN format('coalesce(nullif(%s, ''''), ''[]'')', wanted)
            ELSE wanted END, ', ' ORDER BY name) FILTER (WHERE name <> 'name'),
        string_agg(format('%I = %s', name, value), ', ' ORDER BY name) FILTER (WHERE name <> 'name' AND can_be_set),
        string_agg(quote_ident(name), ', ' ORDER BY name) FILTER (WHERE can_be_set),
        string_agg(value, ', ' ORDER BY name) FILTER (WHERE can_be_set)
    INTO old_name, restored_name, old_row, restored_row, assigned, columns, inserted FROM attributes;
    IF (SELECT atttypid IN ('smallint'::regtype, 'integer'::regtype, 'bigint'::regtype) FROM pg_attribute
        WHERE attrelid = 'obex_dapl_functions'::regclass AND attname = 'id') THEN
        old_id := 'old.id';
    END IF;
    same := format('restored.id = %s AND %s = %s', old_id, restored_name, old_name);
    -- A row whose id is not known: that of the row that is served under its name, or one above all others.
    EXECUTE format('UPDATE restored SET id = newest.id
        FROM (SELECT %s AS name, max(%s) AS id FROM obex_dapl_functions AS old GROUP BY 1) AS newest
        WHERE restored.id IS NULL AND %s = newest.name
            AND NOT EXISTS (SELECT FROM restored AS taken WHERE taken.id = newest.id)',
        old_name, old_id, restored_name);
    EXECUTE format('UPDATE restored SET id = next.id FROM (
        SELECT number, greatest((SELECT max(%s) FROM obex_dapl_functions AS old), (SELECT max(id) FROM restored), 0)
            + row_number() OVER (ORDER BY number) AS id
        FROM restored WHERE id IS NULL) AS next
        WHERE restored.number = next.number', old_id);
    ANALYZE restored;
    EXECUTE format('DELETE FROM obex_dapl_functions AS old WHERE NOT EXISTS (SELECT FROM restored WHERE %s)', same);
    EXECUTE format('UPDATE obex_dapl_functions AS old SET %s FROM restored
        WHERE %s AND (%s) IS DISTINCT FROM (%s)', assigned, same, old_row, restored_row);
    EXECUTE format('INSERT INTO obex_dapl_functions (id, %s) OVERRIDING SYSTEM VALUE
        SELECT restored.id, %s FROM restored
        WHERE NOT EXISTS (SELECT FROM obex_dapl_functions AS old WHERE %s)
        ORDER BY restored.id', columns, inserted, same);
    same := format('%s AND (%s) IS NOT DISTINCT FROM (%s)', same, old_row, restored_row);
    EXECUTE format('SELECT count(*) FROM obex_dapl_functions AS old
        WHERE NOT EXISTS (SELECT FROM restored WHERE %s)', same) INTO others;
    EXECUTE format('SELECT count(*) FROM restored
        WHERE NOT EXISTS (SELECT FROM obex_dapl_functions AS old WHERE %s)', same) INTO missing;
    IF others + missing > 0 THEN
        RAISE EXCEPTION 'obex_dapl_functions cannot be restored: % rows of the catalogue are missing, % are others',
            missing, others
            USING HINT = 'See its triggers, its rules and the types of its columns. Nothing was changed.';
    END IF;
END
$restore$;
-- The next row that is inserted without an id gets a free one.
SELECT setval(pg_get_serial_sequence('obex_dapl_functions', 'id'), greatest(max(id), 1)) FROM restored;
"""

_NO_BYTECODE = """\
-- This catalogue has no bytecode, so avap_bytecode stays as it is, where there is that table.
"""

_BYTECODE = """\
-- Bytecode of {rows} commands. Where the table is made here, the server's role needs SELECT on it to serve them.
CREATE TABLE IF NOT EXISTS avap_bytecode (
    id SERIAL PRIMARY KEY,
    command_name VARCHAR(255) UNIQUE,
    bytecode BYTEA,
    source_hash VARCHAR(64),
    avbc_bytecode BYTEA,
    avbc_version INTEGER
);
LOCK TABLE avap_bytecode IN SHARE ROW EXCLUSIVE MODE;
CREATE TEMPORARY TABLE restored_source ON COMMIT DROP AS
    SELECT name, encode(sha256(convert_to(restored.code, 'UTF8')), 'hex') AS hash, b.code, b.version
    FROM restored LEFT JOIN restored_bytecode AS b USING (number);
ANALYZE restored_source;
-- Bytecode that the catalogue does not have stays, as that of no code, and is served no more.
UPDATE avap_bytecode AS old SET source_hash = '' FROM restored_source AS new
    WHERE new.name = old.command_name::TEXT COLLATE "C" AND new.code IS NULL AND new.hash = lower(old.source_hash);
UPDATE avap_bytecode AS old SET source_hash = new.hash, avbc_bytecode = new.code, avbc_version = new.version
    FROM restored_source AS new WHERE new.name = old.command_name::TEXT COLLATE "C" AND new.code IS NOT NULL AND (
        lower(old.source_hash), old.avbc_bytecode, coalesce(old.avbc_version, 0))
        IS DISTINCT FROM (new.hash, new.code, new.version);
INSERT INTO avap_bytecode (command_name, source_hash, avbc_bytecode, avbc_version)
    SELECT name, hash, code, version FROM restored_source AS new WHERE code IS NOT NULL
        AND NOT EXISTS (SELECT FROM avap_bytecode AS old WHERE old.command_name::TEXT COLLATE "C" = new.name);
"""
