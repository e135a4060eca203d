"""A row's content is judged as a client judges it: code must pass ``compile``, and an interface must be an array for
``json.loads``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from definition_server.catalog.content_check import FUNCTION, INTERFACE, MODULE, Flaw, flaws_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def code_flaws(code: bytes, checks: int = MODULE, name: bytes = b"name") -> Flaw:
    return flaws_of(checks, name, b"not looked at", code)


@given(JSON)
def test_only_arrays_are_interfaces(value: object) -> None:
    flaws = flaws_of(INTERFACE, b"name", json.dumps(value).encode(), b"not looked at: (")
    assert bool(flaws & Flaw.INTERFACE) is not isinstance(value, list)


@given(st.binary(max_size=40))
def test_an_interface_is_refused_if_and_only_if_a_client_refuses_it(interface: bytes) -> None:
    try:
        accepted = isinstance(json.loads(interface.decode()), list)
    except ValueError:
        accepted = False
    assert bool(flaws_of(INTERFACE, b"name", interface, b"") & Flaw.INTERFACE) is not accepted


@pytest.mark.parametrize(
    "interface",
    [b"", b"[", b"[]]", b"[1,]", b"\xff", b"\xef\xbb\xbf[]", b"[" * 200_000, b"[1" + b"0" * 10_000 + b"]",
     b"{}", b"null"],
    ids=[
        "nothing", "open", "closed twice", "comma", "not UTF-8", "mark", "too deep", "too large a number", "object",
        "null",
    ],
)  # fmt: skip
def test_an_interface_that_a_client_cannot_use_is_refused(interface: bytes) -> None:
    assert flaws_of(INTERFACE, b"name", interface, b"") == Flaw.INTERFACE


@pytest.mark.parametrize("interface", [b"[NaN]", b'[{"default": -Infinity}]', b"[Infinity]"])
def test_an_interface_that_only_python_can_read_passes_and_is_noted(interface: bytes) -> None:
    assert flaws_of(INTERFACE, b"name", interface, b"") == Flaw.NOT_STRICT_JSON


@pytest.mark.parametrize(
    "code",
    [
        b"", b"\n", b"pass", b"x = '\\d'", b"1 is 1", b"# coding: latin-1\nx = 1", b"#!/bin/sh\n# coding=cp1252\nx = 1",
        "año = 'ñ'".encode(), b"from os import *", b"x = 1\r\ny = 2\r\n", b"if x:\n\tpass\n", b"\x0cx = 1", b"1<<10**9",
        b"'a'*10**9", b"await_ = 1", b"import does_not_exist",
    ],
)  # fmt: skip
@pytest.mark.parametrize("checks", [MODULE, FUNCTION])
def test_code_that_compiles_passes(code: bytes, checks: int) -> None:
    assert code_flaws(code, checks) == Flaw.NONE


@pytest.mark.parametrize(
    "code",
    [
        b"if", b" x = 1", b"x = 1\n  y = 2", b"a\0b", b"# coding: nosuch\nx = 1", b"#\n# -*- coding: nosuch -*-\nx = 1",
        b"\xef\xbb\xbfx = 1", b"# coding: ascii\nx = '\xc3\xb1'", b"x = " + b"1" * 5000, b"(" * 10_000, b"await x",
        b"yield 1", b"break", b"print 'x'", b"f(**a, *b)", b"'\\N{nosuch}'", b"\xff",
    ],
)  # fmt: skip
@pytest.mark.parametrize("checks", [MODULE, FUNCTION])
def test_code_that_does_not_compile_is_refused(code: bytes, checks: int) -> None:
    if code.startswith(b"yield") and checks == FUNCTION:
        return  # a module that may have `return`, but no other statement that only functions may have
    assert code_flaws(code, checks) & ~(Flaw.EXHAUSTED | Flaw.UNKNOWN_CODING) == Flaw.CODE


def test_a_coding_unknown_to_this_process_is_noted() -> None:
    assert code_flaws(b"# coding: nosuch\nx = 1") == Flaw.CODE | Flaw.UNKNOWN_CODING
    assert code_flaws(b"# coding: hex\nx = 1") & Flaw.CODE
    assert code_flaws(b"# coding: ascii\nif") == Flaw.CODE


@pytest.mark.parametrize(
    "code", [b"return", b"return 1", b"if x:\n  return '''\na\n'''\n", b"def f():\n  return 1\nreturn f"]
)
def test_a_return_at_the_top_compiles_only_as_a_function(code: bytes) -> None:
    assert code_flaws(code, MODULE) == Flaw.CODE
    assert code_flaws(code, FUNCTION) == Flaw.NONE


@pytest.mark.parametrize("code", [b"return\nbreak", b"class C:\n  return 1", b"return\nif", b"return\nawait x"])
def test_a_return_at_the_top_does_not_excuse_other_flaws(code: bytes) -> None:
    assert code_flaws(code, FUNCTION) == Flaw.CODE


def test_parts_of_a_row_that_are_not_to_be_checked_are_skipped() -> None:
    assert flaws_of(0, b"name", b"{", b"if") == Flaw.NONE
    assert flaws_of(MODULE, b"name", b"{", b"if") == Flaw.CODE
    assert flaws_of(INTERFACE, b"name", b"{", b"if") == Flaw.INTERFACE
    assert flaws_of(MODULE | INTERFACE, b"name", b"{", b"if") == Flaw.CODE | Flaw.INTERFACE


def test_code_whose_command_name_compile_refuses_as_a_file_name_is_refused() -> None:
    assert code_flaws(b"pass", name=b"a\0b") == Flaw.CODE
