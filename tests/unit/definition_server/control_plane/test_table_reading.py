"""The parts of a reading that need no database: batches by size, statements, ranges, and mistrusted columns and
tables."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from definition_server.catalog.definition import Row, Unserved
from definition_server.control_plane.table_reading import (
    BATCH_OCTETS,
    EXISTS_SQL,
    Column,
    Plan,
    Relation,
    bytecode_fault,
    classes,
    lock_sql,
    rows_of_batch,
    runs,
    timeouts_sql,
    wait_sql,
    whole_number,
)

MB = 1024 * 1024


@pytest.mark.parametrize("most", [1, 8 * 1024, MB, 8 * MB, 64 * MB])
def test_a_batch_of_the_largest_rows_of_its_class_stays_within_the_size_of_a_batch_unless_it_is_one_row(
    most: int,
) -> None:
    for rows, largest in classes(most):
        assert rows >= 1
        assert rows * largest <= BATCH_OCTETS or rows == 1


def test_small_rows_are_read_by_the_thousand_and_large_ones_alone() -> None:
    assert BATCH_OCTETS == 8 * MB
    assert classes(64 * MB) == [(1000, 8388), (100, 83886), (10, 838860), (1, 8 * MB), (1, 64 * MB)]
    assert classes(MB) == [(1000, 8388), (100, 83886), (10, 838860), (8, MB)]


def test_a_batch_has_as_many_rows_as_its_class_and_names_alone_are_read_by_the_thousand() -> None:
    assert [rows_of_batch(number, MB) for number in range(4)] == [1000, 100, 10, 8]
    assert rows_of_batch(4, MB) == 1000, "rows that are too large: only their names are read"


@pytest.mark.parametrize(
    ("type_", "ours", "octets", "whole"),
    [
        ("bytea", True, True, False),
        ("bytea", False, False, False),
        ("int8", True, False, True),
        ("int8", False, False, False),
        ("text", True, False, False),
    ],
    ids=["bytea", "another bytea", "int8", "another int8", "text"],
)
def test_only_types_of_postgresql_are_read_as_octets_or_whole_numbers(
    type_: str, ours: bool, octets: bool, whole: bool
) -> None:
    column = Column(type_, "b", ours, False, "", True)
    assert column.octets is octets
    assert column.whole_number is whole


OF_POSTGRESQL = {
    "id": "int8", "name": "text", "type": "varchar", "interface": "text", "code": "text",
    "command_name": "text", "source_hash": "text", "avbc_bytecode": "bytea", "avbc_version": "int4",
}  # fmt: skip
DEFINITIONS = ("id", "name", "type", "interface", "code")
BYTECODE = ("command_name", "source_hash", "avbc_bytecode", "avbc_version")


def column(type_: str, **changes: Any) -> Column:
    return replace(Column(type_, "b", True, False, "", True), **changes)


def relation(*names: str, kinds: tuple[str, ...] = ("r heap",), tables: int = 1, **changes: Any) -> Relation:
    """A table of these columns; ``name=column`` replaces one, and other names are those of `Relation`."""
    columns = {name: column(OF_POSTGRESQL[name]) for name in names}
    for name in changes.keys() & columns.keys():
        columns[name] = changes.pop(name)
    given: dict[str, Any] = {"policies_apply": False, "one_row_a_command": True, "blocks": 100} | changes
    return Relation(kinds=kinds, columns=columns, tables=tables, **given)


def plan(bytecode: Relation | None = None, **changes: Any) -> Plan:
    return Plan(relation(*DEFINITIONS, **changes), bytecode)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"kind": "e", "of_postgresql": False}, None),
        (
            {"kind": "e", "of_postgresql": False, "cast_by_user": True},
            "the text of its type text may change without a change of the row",
        ),
        ({"kind": "c"}, "the text of its type text may change without a change of the row"),
        ({"of_postgresql": False}, "the text of its type text may change without a change of the row"),
        ({"type": "regclass"}, "the text of its type regclass may change without a change of the row"),
        ({"cast_by_user": True}, "the text of its type text may change without a change of the row"),
        ({"generated": "v"}, "it is computed when it is read"),
        ({"generated": "s"}, None),
    ],
)
def test_a_text_that_may_change_without_a_new_row_version_is_mistrusted(
    changes: dict[str, Any], reason: str | None
) -> None:
    found = column("text", **changes).mistrust()
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (("r heap",), None),
        (("p", "r heap"), None),
        (("v",), "it is a view"),
        (("p", "f"), "it is a foreign table, or has one below it"),
        (("r columnar",), "it is stored by the access method columnar"),
        (("m",), "it is stored by the access method of a relation of kind m"),
    ],
)
def test_a_table_that_is_no_heap_has_no_fingerprint_and_only_a_heap_of_one_table_has_ranges(
    kinds: tuple[str, ...], reason: str | None
) -> None:
    made = plan(kinds=kinds)
    assert made.mistrust == (None if reason is None else f"obex_dapl_functions: {reason}")
    assert made.blocks == (100 if kinds == ("r heap",) else None)
    assert plan(tables=2).blocks is None, "a table with children"
    assert Plan(relation(*DEFINITIONS), None, tid_ranges=False).blocks is None, "PostgreSQL scans no ranges"
    assert Plan(None, None).blocks is None
    assert Plan(None, None).mistrust is None


def test_a_mistrusted_column_of_either_table_is_named() -> None:
    assert plan(code=column("text", generated="v")).mistrust == (
        "obex_dapl_functions: column code: it is computed when it is read"
    )
    faulty = relation(*BYTECODE, source_hash=column("text", generated="v"))
    assert plan(faulty).mistrust == "avap_bytecode: column source_hash: it is computed when it is read"
    assert plan(faulty).blocks is None


def test_facts_are_parsed_for_each_table_that_exists() -> None:
    one = {"kinds": ["r heap"], "rls": True, "one": False, "tables": 3, "blocks": 7,
           "columns": {"id": ["int4", "b", True, False, "s", False]}}  # fmt: skip
    assert Relation.parse(None) == (None, None)
    first, second = Relation.parse(json.dumps({"0": one}))
    assert first == Relation(("r heap",), True, False, {"id": Column("int4", "b", True, False, "s", False)}, 3, 7)
    assert second is None
    first, second = Relation.parse(json.dumps({"1": one | {"columns": None}}))
    assert first is None
    assert second is not None
    assert second.columns == {}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"avbc_version": column("int4", readable=False)}, "the server's role has no SELECT on it"),
        ({"policies_apply": True}, "its row-level security hides rows from the server's role"),
        ({"avbc_bytecode": column("text")}, "avbc_bytecode is not of type bytea, or avbc_version not an integer"),
        ({"avbc_version": column("numeric")}, "avbc_bytecode is not of type bytea, or avbc_version not an integer"),
    ],
)
def test_bytecode_is_read_from_a_table_of_the_right_columns_that_the_role_may_read(
    changes: dict[str, Any], fault: str | None
) -> None:
    assert bytecode_fault(relation(*BYTECODE, **changes)) == fault
    assert bytecode_fault(relation(*BYTECODE[1:])) == "it has no column command_name"


def test_versions_are_summed_over_exactly_the_tables_that_are_read() -> None:
    alone, both = plan().versions_sql(), plan(relation(*BYTECODE)).versions_sql()
    assert (alone.count("FROM obex_dapl_functions)"), alone.count("avap_bytecode")) == (1, 0)
    assert (both.count("FROM obex_dapl_functions)"), both.count("FROM avap_bytecode)")) == (1, 1)
    assert "sum(hashtidextended(ctid, xmin::text::bigint))" in alone
    of_partitions = "sum(hashtextextended(ctid::text || ':' || xmin::text, tableoid::bigint))"
    assert of_partitions in plan(tables=2).versions_sql()
    assert (plan().versions_by_range, plan(relation(*BYTECODE)).versions_by_range) == (True, False)
    assert not plan(tables=2).versions_by_range
    assert plan().tables == ("obex_dapl_functions",)
    assert plan(relation(*BYTECODE)).tables == ("obex_dapl_functions", "avap_bytecode")


def test_the_statements_before_the_snapshot_are_the_time_limits_and_the_locks() -> None:
    assert EXISTS_SQL == "SELECT FROM obex_dapl_functions LIMIT 0"
    assert timeouts_sql(2.0) == "SET LOCAL statement_timeout = 2000; SET LOCAL lock_timeout = 1600"
    assert lock_sql(["one", "two"]) == "LOCK TABLE one, two IN ACCESS SHARE MODE"
    assert lock_sql([]) == ""
    assert wait_sql(["one", "two"]) == "SELECT FROM one LIMIT 0; SELECT FROM two LIMIT 0"


def test_a_size_is_the_sum_of_four_texts_and_a_text_is_cast_only_if_its_octets_are_not_known_otherwise() -> None:
    plain = " + ".join(f"coalesce(octet_length(t.{name}), 0)::bigint" for name in DEFINITIONS[1:])
    assert plan().sizes_sql(MB) == (
        f"SELECT CASE WHEN octets <= 8388 THEN 0 WHEN octets <= 83886 THEN 1 WHEN octets <= 838860 THEN 2 "
        f"WHEN octets <= {MB} THEN 3 ELSE 4 END, count(*), sum(octets)::bigint "
        f"FROM (SELECT ({plain}) AS octets FROM obex_dapl_functions AS t OFFSET 0) AS sizes GROUP BY 1"
    )
    assert "octet_length(t.code::text)" in plan(code=column("json")).sizes_sql(MB)
    assert "octet_length(t.code::text)" in plan(code=column("text", of_postgresql=False)).sizes_sql(MB)
    bytecode = "coalesce(octet_length(b.avbc_bytecode), 0)"
    assert f"(({plain}) + CASE WHEN ({plain}) + {bytecode} <= {MB} THEN {bytecode} ELSE 0 END) AS octets" in (
        plan(relation(*BYTECODE)).sizes_sql(MB)
    )


@pytest.mark.parametrize(
    ("blocks", "before", "width"),
    [
        (0, None, 8), (8 * 1024 - 1, None, 8), (16 * 1024 - 1, None, 16), (16 * 1024, None, 32), (10**6, None, 1024),
        (8 * 8 * 1024, 8, 8), (8 * 8 * 1024 + 1, 8, 128), (100, 32, 32),
    ],
)  # fmt: skip
def test_a_table_has_about_a_thousand_ranges_which_keep_their_width_until_there_are_eight_thousand(
    blocks: int, before: int | None, width: int
) -> None:
    assert plan(blocks=blocks).width(before) == width


def test_ranges_have_a_count_and_a_fingerprint_and_their_sizes_are_counted_by_class() -> None:
    begins = "SELECT ('(' || begin || ',0)')::tid FROM generate_series(16, 100, 16) AS begin"
    assert plan().ranges_sql(16) == (
        f"SELECT width_bucket(ctid, ARRAY({begins})), count(*), sum(hashtidextended(ctid, xmin::text::bigint))::text "
        "FROM obex_dapl_functions GROUP BY 1"
    )
    sizes = plan().sizes_of_ranges_sql(MB, 16)
    assert sizes.startswith(f"SELECT width_bucket(place, ARRAY({begins})), CASE WHEN octets <= 8388 THEN 0 ")
    assert sizes.endswith(
        f"{plan()._octets(MB)} AS octets FROM obex_dapl_functions AS t OFFSET 0) AS sizes GROUP BY 1, 2"
    )
    both = plan().ranges_and_sizes_sql(MB, 16)
    hashed = "hashtidextended(t.ctid, t.xmin::text::bigint) AS version"
    assert both == sizes.replace("::bigint FROM (", "::bigint, sum(version)::text FROM (").replace(
        " AS octets FROM", f" AS octets, {hashed} FROM"
    )
    assert "ctid >= '(24,0)'::tid AND ctid < '(40,0)'::tid" in plan().sizes_of_ranges_sql(MB, 16, [(24, 40)])


def test_a_class_has_the_rows_above_the_limit_of_the_previous_class_and_within_its_own() -> None:
    octets = plan()._octets(MB)
    texts = "t.id::bigint, t.name::text, t.type::text, t.interface::text, t.code::text"
    where = [plan().rows_sql(number, MB).partition(" WHERE ")[2] for number in range(5)]
    assert where == [
        f"true AND {octets} <= 8388", f"{octets} > 8388 AND {octets} <= 83886",
        f"{octets} > 83886 AND {octets} <= 838860", f"{octets} > 838860 AND {octets} <= {MB}",
        f"{octets} > {MB} AND true",
    ]  # fmt: skip
    assert plan().rows_sql(3, MB).startswith(f"SELECT {texts} FROM obex_dapl_functions AS t WHERE ")
    name = "CASE WHEN octet_length(t.name::text) <= 4096 THEN t.name::text ELSE substring(t.name::text FROM 1 FOR 100)"
    assert plan().rows_sql(4, MB).startswith(f"SELECT t.id::bigint, {name} END, NULL, NULL, NULL FROM ")
    assert "left(t.id::text, 100), t.name, " in plan(id=column("numeric"), name=column("bytea")).rows_sql(0, MB)


def test_bytecode_is_joined_by_name_once_for_each_command_and_left_out_of_rows_that_are_too_large() -> None:
    made = plan(relation(*BYTECODE))
    fits = f"{made._plain_octets()} + coalesce(octet_length(b.avbc_bytecode), 0) <= {MB}"
    assert f"CASE WHEN {fits} THEN b.avbc_bytecode END, b.avbc_version::bigint, b.source_hash::text FROM " in (
        made.rows_sql(3, MB)
    )
    assert "b.avbc_version" not in made.rows_sql(4, MB)
    same = 'ON t.name::text COLLATE "C" = b.command_name::text COLLATE "C"'
    assert f"AS t LEFT JOIN avap_bytecode AS b {same} WHERE" in made.rows_sql(0, MB)
    several = plan(relation(*BYTECODE, one_row_a_command=False)).rows_sql(0, MB)
    assert "JOIN (SELECT DISTINCT ON (command_name) * FROM avap_bytecode ORDER BY command_name) AS b ON" in several
    octets = plan(relation(*BYTECODE), name=column("bytea")).rows_sql(0, MB)
    assert "ON t.name = convert_to(b.command_name::text, 'UTF8') WHERE" in octets


def test_rows_of_ranges_are_read_from_their_blocks_with_the_number_of_their_range() -> None:
    made = plan()
    assert "ctid" not in made.rows_sql(0, MB)
    made.range_blocks = 8
    fields = "SELECT ctid, id, name, type, interface, code FROM obex_dapl_functions WHERE"
    statement = made.rows_sql(0, MB, [(0, 8), (24, 40)])
    assert (
        f"t.code::text, t.ctid FROM ({fields} ctid >= '(0,0)'::tid AND ctid < '(8,0)'::tid UNION ALL "
        f"{fields} ctid >= '(24,0)'::tid AND ctid < '(40,0)'::tid) AS t WHERE true AND"
    ) in statement


@pytest.mark.parametrize("too_large", [False, True])
@pytest.mark.parametrize("made", [plan(), plan(id=column("numeric")), plan(name=column("bytea"))],
                         ids=["plain", "numeric id", "octets"])  # fmt: skip
def test_a_result_is_read_as_a_row_with_or_without_a_range(made: Plan, too_large: bool) -> None:
    values = (5, b"if", b"function", b"[]", b"pass")
    fault = Unserved.TOO_LARGE if too_large else None
    assert made.rows([values], too_large=too_large) == [Row(*values, fault=fault)]
    made.range_blocks = 8
    tids = [block.to_bytes(4, "big") + b"\0\1" for block in (7, 8, 80)]
    assert made.rows([(*values, tid) for tid in tids], too_large=too_large) == [
        Row(*values, fault=fault, range=number) for number in (0, 1, 10)
    ]
    made.range_blocks = None


def test_a_row_without_a_number_or_with_a_zero_octet_in_its_name_is_not_served() -> None:
    texts = (b"function", b"[]", b"pass")
    for made in (plan(), plan(name=column("bytea"))):
        (without,) = made.rows([(None, b"if", *texts)], too_large=False)
        assert (without.id, without.fault) == (None, Unserved.INVALID_ID)
        made.range_blocks = 1
        (without,) = made.rows([(None, b"if", *texts, b"\0\0\0\3\0\1")], too_large=False)
        assert (without.fault, without.range) == (Unserved.INVALID_ID, 3)
        made.range_blocks = None
    assert plan().row((b"7.0", b"i\0f", *texts)).fault is Unserved.INVALID_ENCODING
    assert plan().row((b"7.0", b"i\0f", *texts)).id == 7
    assert plan().row((b"7.5", b"i\0f", *texts)).fault is Unserved.INVALID_ID, "the first fault"
    assert plan().row((7, None, *texts)).fault is None


@pytest.mark.parametrize(
    ("bytecode", "version", "source", "given"),
    [
        (b"\x01", 3, sha256(b"pass").hexdigest().encode(), True),
        (b"\x01", 3, sha256(b"pass").hexdigest().upper().encode(), True),
        (b"\x01", None, sha256(b"pass").hexdigest().encode(), True),
        (b"\x01", 2**31, sha256(b"pass").hexdigest().encode(), False),
        (b"\x01", 3, sha256(b"other").hexdigest().encode(), False),
        (b"\x01", 3, None, False),
        (b"", 3, sha256(b"pass").hexdigest().encode(), False),
        (None, 3, sha256(b"pass").hexdigest().encode(), False),
    ],
    ids=["fits", "upper case", "no version", "large version", "of another code", "no hash", "empty", "none"],
)
def test_bytecode_is_served_with_the_code_that_it_was_made_from(
    bytecode: bytes | None, version: int | None, source: bytes | None, given: bool
) -> None:
    row = plan(relation(*BYTECODE)).row((5, b"if", b"function", b"[]", b"pass", bytecode, version, source))
    expected = (bytecode, version) if given else (None, None)
    assert (row.avbc_code, row.avbc_version) == expected
    assert (row.id, row.name, row.code, row.fault) == (5, b"if", b"pass", None)
    assert plan().row((5, b"if", b"", b"", None, b"\x01", 3, source)).avbc_code is None, "there is no code"


def test_adjacent_ranges_are_one_run_and_a_statement_reads_sixty_four() -> None:
    assert runs([3, 0, 1, 5], 8) == [[(0, 16), (24, 32), (40, 48)]]
    assert runs([2**29 - 1], 8) == [[(2**32 - 8, 2**32 - 1)]], "no block has the last number"
    assert [len(each) for each in runs(range(0, 260, 2), 8)] == [64, 64, 2]
    assert runs([], 8) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (b"7", 7), (b" -7 ", -7), (b"+7", 7), (b"7.000", 7), (b"7.5", None), (b"1e3", 1000), (b"1E+3", 1000),
        (b"70e-1", 7), (b"7e-1", None), (b"", None), (None, None), (b"NaN", None), (b"9223372036854775807", 2**63 - 1),
        (b"9223372036854775808", None), (b"-9223372036854775808", -(2**63)), (b"-9223372036854775809", None),
        (b"0" * 39 + b"7", 7), (b"0" * 40 + b"7", None),
    ],
)  # fmt: skip
def test_a_number_of_any_type_is_a_whole_number_if_it_fits_64_bits(text: bytes | None, number: int | None) -> None:
    assert whole_number(text) == number
