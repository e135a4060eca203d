"""The statements that read the tables of definitions, and the judgement whether their assumptions hold. No connection.

**Change check.** `SHAPE_SQL` describes the two tables: partitions and inheritance children, files, columns, types, and
the row versions of the catalogue that determine the result of a cast to text. `versions_sql` sums over the row versions
of the tables. Together they are the fingerprint (decision 7). The fingerprint is valid only if every row version
belongs to a heap tuple, and the text of each column depends only on that tuple and the system catalogue. `mistrust`
names a violation. Then there is no fingerprint, and the whole table is read in every cycle.

**Locks before the snapshot.** TRUNCATE, REFRESH MATERIALIZED VIEW, and an ALTER TABLE that rewrites the table are not
MVCC-safe, and a name may come to mean another table: if a reading waited for the end of such a transaction with a
snapshot that is older, it would find no rows at all. So `lock_sql` comes first, and then the first statement that takes
the snapshot (PostgreSQL manual, LOCK).

**Ranges.** A single heap is divided into ranges of blocks. `ranges_sql` sums over the row versions of each range, so
that only the rows of changed ranges need to be read. They are read by TID range scans (from PostgreSQL 14; earlier
versions would scan the whole table for each). An UPDATE that moves a row to another block changes both ranges.
Partitioned tables, tables with inheritance children, and tables for which `mistrust` names a violation have no ranges.
If there are ranges, the fingerprint of the table is the sum of the fingerprints of the ranges. So the first reading of
a connection, which needs both, computes them in one scan.

**Sizes before content.** `sizes_sql` counts octets, without fetching or decompressing a text. Rows are then read by
classes of size, so that a batch has at most 8 MiB, whatever the order in which the database scans the table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from operator import itemgetter
from typing import Any, LiteralString

from definition_server.catalog import wire
from definition_server.catalog.definition import Row, Unserved

TABLE = "obex_dapl_functions"
BYTECODE_TABLE = "avap_bytecode"

BATCH_OCTETS = 8 * 1024 * 1024
_CLASSES = (1000, 100, 10, 1)
"""The number of rows in a batch, for each class of size. The largest row of a class has `BATCH_OCTETS` divided by this
number.
"""

ROW_OVERHEAD = 150
"""Octets that a definition adds to a snapshot beside its four texts: tags and lengths, hash, and two index slots."""

_RANGES = 1024
"""The approximate number of ranges of a table that is not small. So one change causes 0.1 % of the table to be read."""
_MOST_RANGES = 8 * _RANGES
_LEAST_BLOCKS = 8
_LAST_BLOCK = 2**32 - 1
"""No heap has a block of this number."""

_RUNS = 64
"""The most runs of ranges that one statement reads. Each run is a separate scan in the plan."""

_LOCK_SHARE = 0.8

_LONGEST_NAME = 4096
"""Octets of the name that are read if the row is too large. A longer name does not fit into a request."""

# Local settings: behind a pooler, the next client of the connection does not inherit them. With row_security off, rows
# that a policy would hide cause an error. jit is off because compiling these statements takes longer than running them.
# The other settings fix the result of a cast to text, so that it does not depend on postgresql.conf, the database or
# the role.
SETTINGS_SQL: LiteralString = """
SELECT set_config('row_security', 'off', true), set_config('bytea_output', 'hex', true),
    set_config('DateStyle', 'ISO, YMD', true), set_config('IntervalStyle', 'postgres', true),
    set_config('TimeZone', 'UTC', true), set_config('extra_float_digits', '1', true),
    set_config('xmlbinary', 'base64', true), set_config('jit', 'off', true)
"""

EXISTS_SQL: LiteralString = f"SELECT FROM {TABLE} LIMIT 0"
"""Fails if the table does not exist or may not be read. It reads no row."""

# The result is one row of `facts` and `state`. `facts` describes in JSON each of the two tables that existed when the
# snapshot was taken (to_regclass alone would also find later ones), see `Relation.parse`. `state` must be equal in two
# checks; otherwise rows may have changed. Its sums of 64-bit hashes do not depend on the order of a scan. The parts of
# `state` are: files, which change with TRUNCATE and if another table takes the place of the table; attributes, because
# ALTER TABLE can change the content of rows without a new row version; types and enum labels, because rows hold numbers
# in place of them; casts, because ::text may call a function; lc_monetary, the only setting that affects a text (that
# of the type money) and is not fixed above; and the start time, which distinguishes servers, because a promoted standby
# may have assigned the same transaction number to other work.
SHAPE_SQL: LiteralString = f"""
WITH RECURSIVE
root(number, relid) AS (
    SELECT number, oid FROM (VALUES (0, '{TABLE}'), (1, '{BYTECODE_TABLE}')) AS named(number, name)
    JOIN pg_class ON oid = to_regclass(name)),
tree(number, relid) AS (
    SELECT number, relid FROM root
    UNION SELECT number, inhrelid FROM tree JOIN pg_inherits ON inhparent = relid),
col AS (
    SELECT number, attname, atttypid, coalesce(to_jsonb(a) ->> 'attgenerated', '') AS made, relid, attnum
    FROM root JOIN pg_attribute a ON attrelid = relid
    WHERE attnum > 0 AND NOT attisdropped AND attname IN ('id', 'name', 'type', 'interface', 'code',
        'command_name', 'source_hash', 'avbc_bytecode', 'avbc_version')),
typ(start, typid) AS (
    SELECT atttypid, atttypid FROM col
    UNION SELECT start, typbasetype FROM typ JOIN pg_type ON pg_type.oid = typid WHERE typtype = 'd'),
base AS (
    SELECT start, typname, typtype, typnamespace = 'pg_catalog'::regnamespace AS ours, EXISTS (
        SELECT FROM typ AS any_of JOIN pg_cast ON castsource = any_of.typid
        WHERE any_of.start = typ.start AND casttarget = 'text'::regtype AND castfunc >= 16384) AS cast_by_user
    FROM typ JOIN pg_type ON pg_type.oid = typid WHERE typtype <> 'd')
SELECT
    (SELECT jsonb_object_agg(number, jsonb_build_object(
        'kinds', (SELECT jsonb_agg(DISTINCT concat_ws(' ', relkind, amname)) FROM tree
            JOIN pg_class ON pg_class.oid = tree.relid LEFT JOIN pg_am ON pg_am.oid = relam
            WHERE tree.number = root.number),
        'rls', row_security_active(relid),
        'tables', (SELECT count(*) FROM tree WHERE tree.number = root.number),
        'blocks', coalesce(pg_relation_size(relid), 0) / current_setting('block_size')::int,
        'one', EXISTS (SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
            WHERE indrelid = relid AND indisunique AND indisvalid AND indpred IS NULL AND indnkeyatts = 1
            AND attname = 'command_name'),
        'columns', (SELECT jsonb_object_agg(attname, jsonb_build_array(
                typname, typtype, ours, cast_by_user, made, has_column_privilege(relid, attnum, 'SELECT')))
            FROM col JOIN base ON start = atttypid WHERE col.number = root.number)))
        FROM root)::text AS facts,
    concat_ws('/',
        (SELECT string_agg(concat_ws(':', number, relid, pg_relation_filenode(relid)), ',' ORDER BY number, relid)
            FROM tree),
        (SELECT sum(hashtextextended(a.ctid::text || ':' || a.xmin::text, 0))
            FROM pg_attribute a WHERE attrelid = ANY (ARRAY(SELECT relid FROM tree))),
        (SELECT sum(hashtextextended(t.ctid::text || ':' || t.xmin::text, 0))
            FROM pg_type t WHERE oid = ANY (ARRAY(SELECT typid FROM typ))),
        (SELECT sum(hashtextextended(e.ctid::text || ':' || e.xmin::text, 0))
            FROM pg_enum e WHERE enumtypid = ANY (ARRAY(SELECT typid FROM typ))),
        (SELECT sum(hashtextextended(c.ctid::text || ':' || c.xmin::text, 0))
            FROM pg_cast c WHERE castsource = ANY (ARRAY(SELECT typid FROM typ))),
        current_setting('lc_monetary'),
        extract(epoch FROM pg_postmaster_start_time()),
        pg_is_in_recovery()) AS state
"""


def timeouts_sql(statement_timeout: float) -> LiteralString:
    """Local settings that limit the time of each statement to ``statement_timeout`` seconds. They take no snapshot."""
    milliseconds = int(statement_timeout * 1000)
    # The wait for a lock is shorter, so that the error names the lock as the cause.
    lock = int(statement_timeout * 1000 * _LOCK_SHARE)
    return _literal(f"SET LOCAL statement_timeout = {milliseconds}; SET LOCAL lock_timeout = {lock}")


def lock_sql(tables: Collection[str]) -> LiteralString:
    """A statement that locks ``tables`` as reading them does, but takes no snapshot. Empty if there are none."""
    return _literal(f"LOCK TABLE {', '.join(tables)} IN ACCESS SHARE MODE" if tables else "")


def wait_sql(tables: Collection[str]) -> LiteralString:
    """Statements that wait for others that hold a lock on ``tables``, by reading no row of each."""
    return _literal("; ".join(f"SELECT FROM {table} LIMIT 0" for table in tables))


@dataclass(frozen=True, slots=True)
class Column:
    """The properties on which a column's text depends. A domain is described by its base type."""

    type: str
    kind: str
    """``typtype`` of ``pg_type``: ``b`` base, ``e`` enum, …"""
    of_postgresql: bool
    cast_by_user: bool
    generated: str
    readable: bool

    @property
    def octets(self) -> bool:
        """Whether the column holds octets (bytea), which are treated as text in UTF-8."""
        return self.of_postgresql and self.type == "bytea"

    @property
    def whole_number(self) -> bool:
        """Whether the type is one of the integer types of at most 64 bits."""
        return self.of_postgresql and self.type in ("int2", "int4", "int8")

    def mistrust(self) -> str | None:
        """The reason why the column's text may change without a new row version or a change of the system catalogue;
        None if it cannot.
        """
        known = self.kind == "e" or (self.of_postgresql and self.kind == "b" and not self.type.startswith("reg"))
        if not known or self.cast_by_user:
            return f"the text of its type {self.type} may change without a change of the row"
        return "it is computed when it is read" if self.generated == "v" else None


_UNKNOWN = Column("text", "b", True, False, "", True)


@dataclass(frozen=True, slots=True)
class Relation:
    """One of the two tables, as `SHAPE_SQL` describes it."""

    kinds: tuple[str, ...]
    """``relkind`` and access method of the table and of all its descendants: ``r heap``, ``p``, ``v``, ``f`` …"""
    policies_apply: bool
    one_row_a_command: bool
    columns: Mapping[str, Column]
    tables: int = 1
    """The number of tables: the table itself and all its descendants."""
    blocks: int = 0
    """Blocks of its heap."""

    @staticmethod
    def parse(facts: str | None) -> tuple[Relation | None, Relation | None]:
        """The table of definitions and that of bytecode; None for one that does not exist."""
        found: dict[str, Any] = json.loads(facts) if facts else {}
        first, second = (found.get(number) for number in ("0", "1"))
        return (
            None if first is None else Relation._parse(first),
            None if second is None else Relation._parse(second),
        )

    @staticmethod
    def _parse(facts: dict[str, Any]) -> Relation:
        columns = facts["columns"] or {}
        return Relation(
            tuple(facts["kinds"]),
            facts["rls"],
            facts["one"],
            {name: Column(*values) for name, values in columns.items()},
            facts["tables"],
            facts["blocks"],
        )

    @property
    def is_heap(self) -> bool:
        """Whether the table is a single heap, without partitions or inheritance children."""
        return self.kinds == ("r heap",) and self.tables == 1

    def mistrust(self) -> str | None:
        """The reason why the table's row versions do not show every change; None if they do."""
        for kind in self.kinds:
            letter, _, method = kind.partition(" ")
            if letter == "v":
                return "it is a view"
            if letter == "f":
                return "it is a foreign table, or has one below it"
            if letter != "p" and method != "heap":
                return f"it is stored by the access method {method or 'of a relation of kind ' + letter}"
        faults = ((name, column.mistrust()) for name, column in self.columns.items())
        return next((f"column {name}: {fault}" for name, fault in faults if fault), None)


_BYTECODE_COLUMNS = ("command_name", "source_hash", "avbc_bytecode", "avbc_version")


def bytecode_fault(relation: Relation) -> str | None:
    """The reason why no bytecode can be read from ``relation``; None if it can."""
    missing = [name for name in _BYTECODE_COLUMNS if name not in relation.columns]
    if missing:
        return f"it has no column {missing[0]}"
    if not all(relation.columns[name].readable for name in _BYTECODE_COLUMNS):
        return "the server's role has no SELECT on it"
    if relation.policies_apply:
        return "its row-level security hides rows from the server's role"
    if not relation.columns["avbc_bytecode"].octets or not relation.columns["avbc_version"].whole_number:
        return "avbc_bytecode is not of type bytea, or avbc_version not an integer"
    return None


class Plan:
    """The statements that read the tables in their present form."""

    def __init__(self, definitions: Relation | None, bytecode: Relation | None, *, tid_ranges: bool = True) -> None:
        """
        Args:
            definitions: The table of definitions; None if its form is not known.
            bytecode: The table of bytecode; None if no bytecode is to be read.
            tid_ranges: Whether PostgreSQL scans ranges of TIDs.
        """
        self._columns = {} if definitions is None else definitions.columns
        self._bytecode = bytecode
        relations = ((TABLE, definitions), (BYTECODE_TABLE, bytecode))
        faults = ((name, relation.mistrust()) for name, relation in relations if relation is not None)
        self.mistrust = next((f"{name}: {fault}" for name, fault in faults if fault), None)
        """The reason why the tables are read whole in every cycle; None if their row versions are a fingerprint."""
        ranges = tid_ranges and self.mistrust is None
        self.blocks = definitions.blocks if ranges and definitions is not None and definitions.is_heap else None
        """Blocks of the table's heap; None if it has no ranges."""
        self.range_blocks: int | None = None
        """Blocks of a range, if rows are to name their range; otherwise None."""

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that are read."""
        return (TABLE,) if self._bytecode is None else (TABLE, BYTECODE_TABLE)

    @property
    def versions_by_range(self) -> bool:
        """Whether the fingerprint of the tables follows from those of the ranges."""
        return self.blocks is not None and self._bytecode is None

    def versions_sql(self) -> LiteralString:
        """One row: the sum over all row versions. Its cost is one scan of the heap, and no text is read."""
        # Every INSERT and UPDATE writes a row version with a new (ctid, xmin); DELETE and TRUNCATE remove versions.
        # The sum over a heap is the sum over the fingerprints of its ranges.
        hashed = _VERSION_IN_TABLE if self.blocks is None else _version("ctid", "xmin")
        sums = [_versions(TABLE, hashed), *([_versions(BYTECODE_TABLE, _VERSION_IN_TABLE)] if self._bytecode else [])]
        return _literal(f"SELECT concat_ws('/', {', '.join(sums)})")

    def sizes_sql(self, most: int) -> LiteralString:
        """Rows of (class, rows, octets). A row above ``most`` octets is in an additional class, behind the last of
        `_CLASSES`.
        """
        # With OFFSET 0 the sum is computed once for each row, and not again for each limit.
        return _literal(
            f"SELECT {_class('octets', most)}, count(*), sum(octets)::bigint "
            f"FROM (SELECT {self._octets(most)} AS octets {self._from()} OFFSET 0) AS sizes GROUP BY 1"
        )

    def width(self, before: int | None) -> int:
        """The number of blocks of a range. It is ``before``, the number at an earlier moment, unless the table has
        grown too much since then.
        """
        assert self.blocks is not None, "it has ranges"
        if before is not None and self.blocks <= before * _MOST_RANGES:
            return before
        return max(_LEAST_BLOCKS, 1 << (self.blocks // _RANGES).bit_length())

    def ranges_sql(self, width: int) -> LiteralString:
        """Rows of (range, rows, fingerprint), for ranges of ``width`` blocks.

        The fingerprint is a sum like that of `versions_sql`, over the rows of the range. The scan reads no column.
        """
        return _literal(
            f"SELECT {self._range(width, 'ctid')}, count(*), sum({_version('ctid', 'xmin')})::text "
            f"FROM {TABLE} GROUP BY 1"
        )

    def sizes_of_ranges_sql(self, most: int, width: int, blocks: Collection[tuple[int, int]] = ()) -> LiteralString:
        """Rows of (range, class, rows, octets) of all ranges, or of those in ``blocks``. Classes: see `sizes_sql`."""
        return self._sizes_of_ranges(most, width, blocks)

    def ranges_and_sizes_sql(self, most: int, width: int) -> LiteralString:
        """`ranges_sql` and `sizes_of_ranges_sql` in one scan: rows of (range, class, rows, octets, fingerprint). The
        fingerprint of a range is the sum of the fingerprints of its classes. May be used only if `versions_by_range`.
        """
        assert self.versions_by_range
        return self._sizes_of_ranges(most, width, version=_version("t.ctid", "t.xmin"))

    def _sizes_of_ranges(
        self, most: int, width: int, blocks: Collection[tuple[int, int]] = (), version: str = ""
    ) -> LiteralString:
        found = f"t.ctid AS place, {self._octets(most)} AS octets" + (f", {version} AS version" if version else "")
        # OFFSET 0, as in `sizes_sql`: without it PostgreSQL may sort whole rows to group them.
        return _literal(
            f"SELECT {self._range(width, 'place')}, {_class('octets', most)}, count(*), sum(octets)::bigint"
            f"{', sum(version)::text' if version else ''} "
            f"FROM (SELECT {found} {self._from(blocks)} OFFSET 0) AS sizes GROUP BY 1, 2"
        )

    def _range(self, width: int, place: str) -> str:
        """The range of ``width`` blocks that has the tid ``place``, as SQL: the number of ranges after the first that
        begin at or before it.

        The SQL searches an array, which takes half the time of parsing the block number from the tid's text.
        """
        begins = f"SELECT ('(' || begin || ',0)')::tid FROM generate_series({width}, {self.blocks}, {width}) AS begin"
        return f"width_bucket({place}, ARRAY({begins}))"

    def rows_sql(self, number: int, most: int, blocks: Collection[tuple[int, int]] = ()) -> LiteralString:
        """The rows of class ``number``, in the form that `row` takes: all rows of the class, or those in ``blocks``
        (first, end).
        """
        limits = [limit for _, limit in classes(most)]
        octets = self._octets(most)
        within = f"{octets} <= {limits[number]}" if number < len(limits) else "true"
        above = f"{octets} > {limits[number - 1]}" if number else "true"
        too_large = number == len(limits)
        texts = ["NULL", "NULL", "NULL"] if too_large else [self._text(name) for name in ("type", "interface", "code")]
        fields = [self._id(), self._short_name() if too_large else self._text("name"), *texts]
        if self._bytecode is not None and not too_large:
            fits = f"{self._plain_octets()} + {_BYTECODE_OCTETS} <= {most}"
            fields += [f"CASE WHEN {fits} THEN b.avbc_bytecode END", "b.avbc_version::bigint", "b.source_hash::text"]
        if self.range_blocks is not None:
            fields.append("t.ctid")
        return _literal(f"SELECT {', '.join(fields)} {self._from(blocks)} WHERE {above} AND {within}")

    def rows(self, results: list[tuple[Any, ...]], *, too_large: bool) -> list[Row]:
        """Results of `rows_sql` as rows."""
        plain = not too_large and self._bytecode is None and not self._column("name").octets
        plain = plain and self._column("id").whole_number
        width = self.range_blocks
        if plain and None not in map(_FIRST, results):
            # Calling the class's constructor with one tuple takes half the time, which matters for large tables.
            make, number_of, nothing = tuple.__new__, int.from_bytes, (None, None, None)
            if width is None:
                return [make(Row, (*values, *nothing, None)) for values in results]
            # A tid in binary form: 32 bits of the block, and 16 bits of the number within the block.
            return [make(Row, (*values[:5], *nothing, number_of(values[5][:4]) // width)) for values in results]
        if width is None:
            return [self.row(values, too_large=too_large) for values in results]
        return [
            self.row(values[:-1], too_large=too_large)._replace(range=int.from_bytes(values[-1][:4]) // width)
            for values in results
        ]

    def row(self, values: tuple[Any, ...], *, too_large: bool = False) -> Row:
        """A result of `rows_sql` as a row."""
        given, name, kind, interface, code = values[:5]
        row_id = given if isinstance(given, int) else whole_number(given)
        fault = Unserved.TOO_LARGE if too_large else Unserved.INVALID_ID if row_id is None else None
        # Only a bytea can hold a zero octet: PostgreSQL refuses it in a text.
        if fault is None and name and b"\0" in name:
            fault = Unserved.INVALID_ENCODING
        if len(values) > 5 and values[5] and code is not None:
            _, _, _, _, _, bytecode, version, source = values
            fits = version is None or wire.fits_int32(version)
            if fits and source and source.lower() == hashlib.sha256(code).hexdigest().encode():
                return Row(row_id, name, kind, interface, code, bytecode, version, fault)
        return Row(row_id, name, kind, interface, code, fault=fault)

    def _column(self, name: str) -> Column:
        # If the column does not exist, PostgreSQL's own error names it.
        return self._columns.get(name, _UNKNOWN)

    def _id(self) -> str:
        return "t.id::bigint" if self._column("id").whole_number else "left(t.id::text, 100)"

    def _text(self, name: str) -> str:
        # The columns are cast, because their types may differ from those that we expect (json, varchar), and the wire
        # format needs text.
        return f"t.{name}" if self._column(name).octets else f"t.{name}::text"

    def _short_name(self) -> str:
        name = self._text("name")
        cut = f"substring({name} FROM 1 FOR 100)"
        return f"CASE WHEN octet_length({name}) <= {_LONGEST_NAME} THEN {name} ELSE {cut} END"

    def _plain_octets(self) -> str:
        """Octets of the four texts. For these types the length is known without fetching content that is stored out of
        line.
        """
        return " + ".join(
            f"coalesce(octet_length({f't.{name}' if self._measurable(name) else f't.{name}::text'}), 0)::bigint"
            for name in ("name", "type", "interface", "code")
        )

    def _measurable(self, name: str) -> bool:
        column = self._column(name)
        return column.of_postgresql and column.type in ("text", "varchar", "bpchar", "bytea")

    def _octets(self, most: int) -> str:
        plain = f"({self._plain_octets()})"
        if self._bytecode is None:
            return plain
        # If the bytecode does not fit beside its definition, the bytecode is left out, and the definition is served.
        return f"({plain} + CASE WHEN {plain} + {_BYTECODE_OCTETS} <= {most} THEN {_BYTECODE_OCTETS} ELSE 0 END)"

    def _table(self, blocks: Collection[tuple[int, int]]) -> str:
        if not blocks:
            return TABLE
        # One branch of the UNION for each run, because PostgreSQL can scan a range of TIDs, but not several ranges in
        # one scan.
        parts = (
            f"SELECT ctid, id, name, type, interface, code FROM {TABLE} "
            f"WHERE ctid >= '({first},0)'::tid AND ctid < '({end},0)'::tid"
            for first, end in blocks
        )
        return f"({' UNION ALL '.join(parts)})"

    def _from(self, blocks: Collection[tuple[int, int]] = ()) -> str:
        table = self._table(blocks)
        if self._bytecode is None:
            return f"FROM {table} AS t"
        source = BYTECODE_TABLE
        if not self._bytecode.one_row_a_command:
            source = f"(SELECT DISTINCT ON (command_name) * FROM {BYTECODE_TABLE} ORDER BY command_name)"
        same = 't.name::text COLLATE "C" = b.command_name::text COLLATE "C"'
        if self._column("name").octets:
            same = "t.name = convert_to(b.command_name::text, 'UTF8')"
        return f"FROM {table} AS t LEFT JOIN {source} AS b ON {same}"


_FIRST = itemgetter(0)
_VERSION_IN_TABLE = "hashtextextended(ctid::text || ':' || xmin::text, tableoid::bigint)"
"""The hash of a row version of a table that may have partitions or inheritance children, as SQL. The table is the seed,
because one partition may take the place of another.
"""
_BYTECODE_OCTETS = "coalesce(octet_length(b.avbc_bytecode), 0)"


def _version(ctid: str, xmin: str) -> str:
    """The hash of a row version of a single heap, as SQL."""
    # The transaction id is the seed of the tid's hash, so the two need not be joined as a text. (PostgreSQL has this
    # function since version 12.)
    return f"hashtidextended({ctid}, {xmin}::text::bigint)"


def _versions(table: str, hashed: str) -> str:
    """The number of rows of ``table`` and the sum over them of ``hashed``, as SQL."""
    return f"(SELECT concat_ws(':', count(*), coalesce(sum({hashed}), 0)) FROM {table})"


def _class(octets: str, most: int) -> str:
    """The class of size of a row that has ``octets``, as SQL."""
    limits = [limit for _, limit in classes(most)]
    number = " ".join(f"WHEN {octets} <= {limit} THEN {index}" for index, limit in enumerate(limits))
    return f"CASE {number} ELSE {len(limits)} END"


def runs(ranges: Collection[int], width: int) -> list[list[tuple[int, int]]]:
    """The blocks (first, end) of ``ranges`` of ``width`` blocks, with adjacent ranges joined. Each group is for one
    statement.
    """
    found: list[tuple[int, int]] = []
    for number in sorted(ranges):
        first, end = number * width, min((number + 1) * width, _LAST_BLOCK)
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], end
        else:
            found.append((first, end))
    return [found[start : start + _RUNS] for start in range(0, len(found), _RUNS)]


def classes(most: int) -> list[tuple[int, int]]:
    """(Rows of a batch, octets of the largest row) of each class, if rows of more than ``most`` octets are not read."""
    return [(rows, BATCH_OCTETS // rows) for rows in _CLASSES if BATCH_OCTETS // rows < most] + [
        (max(1, min(_CLASSES[0], BATCH_OCTETS // most)), most)
    ]


def rows_of_batch(number: int, most: int) -> int:
    """The most rows in a batch of class ``number``. For rows that are too large, only the names are read."""
    found = classes(most)
    return found[number][0] if number < len(found) else _CLASSES[0]


_NUMBER = re.compile(rb"([+-]?[0-9]{1,40})(\.0*)?(?:e([+-]?[0-9]{1,3}))?", re.IGNORECASE)


def whole_number(text: bytes | None) -> int | None:
    """The 64-bit integer in ``text``, as PostgreSQL writes numbers of any type; None if it is not one."""
    found = None if text is None else _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    digits, _, exponent = found.groups()
    value = int(digits) * Fraction(10) ** int(exponent or 0)
    return int(value) if value.denominator == 1 and -(2**63) <= value < 2**63 else None


def _literal(text: str) -> LiteralString:
    """``text`` as a `LiteralString`: it consists only of our constants and numbers."""
    return text
