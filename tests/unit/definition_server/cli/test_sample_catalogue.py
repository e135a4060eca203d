"""The sample catalogue fits the table, and each body fits its interface."""

from __future__ import annotations

import ast
import builtins
import csv
import dataclasses
import io
import json
import re
import symtable
from collections.abc import Callable

import pytest

from definition_server.catalog.restore_sql import CREATE_TABLE_SQL
from definition_server.cli.sample_catalogue import (
    COLUMNS,
    NULL,
    SampleCommand,
    as_csv,
    load_sample_catalogue,
)

COMMANDS = load_sample_catalogue()
CONTROL_FLOW = {
    *("if", "else", "end", "startLoop", "endLoop", "try", "exception"),
    *("function", "return", "import", "include"),
}
LARGEST_BODY = 2500
NOT_FOR_A_SAMPLE = {"ctypes", "pickle", "shutil", "socket", "subprocess", "sys"}


def each_command(check: Callable[[SampleCommand], None]) -> Callable[[], None]:
    """One test that applies ``check`` to all commands, because 189 tests for each of six checks would take longer than
    the checks."""

    def test() -> None:
        failed = {}
        for command in COMMANDS:
            try:
                check(command)
            except (AssertionError, SyntaxError) as error:
                failed[command.name] = str(error)
        assert not failed

    return test


def size(command: SampleCommand) -> int:
    return len((command.code or "").encode())


def interface_of(command: SampleCommand) -> list[dict[str, str]]:
    interface = json.loads(command.interface or "[]")
    assert isinstance(interface, list)
    return interface


def read_back(text: str) -> list[SampleCommand]:
    """The commands in our CSV, read by Python's reader, which does not distinguish quoted fields."""
    commands = []
    for row in csv.reader(io.StringIO(text, newline=""), strict=True):
        values = [None if value == NULL else value for value in row]
        fields = dict(zip(COLUMNS, values, strict=True))
        logic = {"True": True, "False": False, None: None}[fields.pop("logic")]
        commands.append(SampleCommand(**fields, logic=logic))
    return commands


def test_catalogue_has_at_least_130_commands() -> None:
    assert len(COMMANDS) >= 130


def test_every_load_returns_the_same_commands() -> None:
    assert load_sample_catalogue() == COMMANDS


def test_names_are_unique() -> None:
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)


def test_control_flow_is_complete() -> None:
    assert {command.name for command in COMMANDS} >= CONTROL_FLOW | {"addVar", "addParam", "addResult"}


def test_no_two_commands_share_a_body_or_a_description() -> None:
    assert len({command.code for command in COMMANDS}) == len(COMMANDS)
    assert len({command.description for command in COMMANDS}) == len(COMMANDS)


def test_some_columns_are_null_and_some_interfaces_empty() -> None:
    assert sum(command.type is None for command in COMMANDS) >= 2
    assert sum(command.interface is None for command in COMMANDS) >= 2
    assert sum(command.interface == "[]" for command in COMMANDS) >= 2


@each_command
def test_values_fit_their_columns(command: SampleCommand) -> None:
    limits = {name: int(limit) for name, limit in re.findall(r"(\w+) VARCHAR\((\d+)\)", CREATE_TABLE_SQL)}
    assert set(limits) == {"name", "type", "componenttype", "service", "command"}
    for column, limit in limits.items():
        value = getattr(command, column)
        assert value is None or 0 < len(value) <= limit, column
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", command.name)
    assert isinstance(command.logic, bool)
    assert command.description
    assert command.description.endswith(".")
    assert "\n" not in command.description


@each_command
def test_interface_is_an_array_of_item_and_type(command: SampleCommand) -> None:
    interface = interface_of(command)
    for parameter in interface:
        assert parameter.keys() == {"item", "type"}
        assert parameter["type"] in {"var", "variable", "value", "literal"}
    assert len({parameter["item"] for parameter in interface}) == len(interface)


def test_interface_is_compact_json() -> None:
    (add_var,) = [command for command in COMMANDS if command.name == "addVar"]
    assert add_var.interface == '[{"item":"variable","type":"var"},{"item":"value","type":"value"}]'


@each_command
def test_a_body_compiles(command: SampleCommand) -> None:
    assert command.code
    compile(command.code, command.name, "exec")
    assert size(command) <= LARGEST_BODY


@each_command
def test_a_body_uses_exactly_the_parameters_of_its_interface(command: SampleCommand) -> None:
    code = command.code or ""
    declared = {parameter["item"] for parameter in interface_of(command)}
    assert declared <= set(re.findall(r"""["'](\w+)["']""", code))
    assert set(re.findall(r"""args(?:\[|\.get\()["'](\w+)["']""", code)) <= declared


@each_command
def test_a_body_reads_no_undefined_name(command: SampleCommand) -> None:
    module = symtable.symtable(command.code or "", command.name, "exec")
    known = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    known |= {"args", "context", *dir(builtins)}
    tables = [module]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        free = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        if table is module:
            free = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
        assert free <= known


@each_command
def test_a_body_imports_and_calls_nothing_dangerous(command: SampleCommand) -> None:
    for node in ast.walk(ast.parse(command.code or "")):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & NOT_FOR_A_SAMPLE
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in NOT_FOR_A_SAMPLE
        if isinstance(node, ast.Name):
            assert node.id not in {"eval", "exec", "compile", "__import__", "open", "globals"}


def test_most_bodies_are_short_and_many_realistic() -> None:
    assert sum(size(command) <= 600 for command in COMMANDS) > len(COMMANDS) / 2
    assert sum(800 <= size(command) <= LARGEST_BODY for command in COMMANDS) >= 12


def test_fields_are_in_the_order_of_the_columns() -> None:
    assert tuple(field.name for field in dataclasses.fields(SampleCommand)) == COLUMNS
    in_table = re.findall(r"^    (\w+) ", CREATE_TABLE_SQL, flags=re.MULTILINE)
    assert ("id", *COLUMNS) == tuple(in_table)


def test_csv_reads_back_as_the_same_commands() -> None:
    assert read_back(as_csv(COMMANDS)) == list(COMMANDS)


def test_csv_reads_back_null_and_awkward_texts() -> None:
    commands = [
        SampleCommand(name="allNull"),
        SampleCommand(name="empty", interface="", description="", type="", code=""),
        SampleCommand(name="signs", description='a, "b"; c\\', logic=True, code="'\"\"'\r\n\tñ•𝄞\n\n"),
    ]
    assert read_back(as_csv(commands)) == commands


def test_csv_of_no_commands_is_empty() -> None:
    assert as_csv([]) == ""


def test_only_null_is_written_without_quotes() -> None:
    command = SampleCommand(name=NULL, description="", logic=False)
    assert as_csv([command]) == r'"\N",\N,"",\N,False,\N,\N,\N,\N' + "\n"


@pytest.mark.parametrize("text", ["a\0b", "\\.", "first\n\\.\nlast", "first\r\n\\.\r\n"])
def test_text_that_psql_cannot_copy_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="code of 'bad'"):
        as_csv([SampleCommand(name="bad", code=text)])


@pytest.mark.parametrize("text", ["\\. ", "a\\.b", ".", "\\\\."])
def test_text_that_only_resembles_the_end_of_data_is_copied(text: str) -> None:
    command = SampleCommand(name="good", code=text)
    assert read_back(as_csv([command])) == [command]
