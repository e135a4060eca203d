"""A row is served unless the wire format cannot carry it. Each unserved row is counted under one reason, and the number
of examples is limited.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from definition_server.catalog.definition import Row, Unserved
from definition_server.catalog.validation import Findings, Suspect, reason_not_served

GOOD = Row(1, b"if", b"function", b"[]", b"pass")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD, None),
        (GOOD._replace(type=None, interface=None, code=b""), None),
        (GOOD._replace(type=b"", interface=b""), None),
        (GOOD._replace(name="año\n'\"".encode(), code="\U0001f40d\0".encode()), None),
        (GOOD._replace(name=None), Unserved.NULL_NAME),
        (GOOD._replace(name=None, code=None), Unserved.NULL_NAME),
        (GOOD._replace(name=b""), Unserved.EMPTY_NAME),
        (GOOD._replace(name=b"", code=b"\xff"), Unserved.EMPTY_NAME),
        (GOOD._replace(code=None), Unserved.NULL_CODE),
        (GOOD._replace(name=b"\xff", code=None), Unserved.NULL_CODE),
        *((GOOD._replace(**{field: b"\xe9"}), Unserved.INVALID_ENCODING) for field in Row._fields[1:5]),
        (GOOD._replace(id=None, fault=Unserved.INVALID_ID), Unserved.INVALID_ID),
        (GOOD._replace(code=None, fault=Unserved.TOO_LARGE), Unserved.TOO_LARGE),
        (GOOD._replace(name=None, fault=Unserved.TOO_LARGE), Unserved.NULL_NAME),
        (GOOD._replace(code=b"\xed\xa0\x80"), Unserved.INVALID_ENCODING),  # a surrogate, which protobuf refuses
        (GOOD._replace(code=b"\xc0\x80"), Unserved.INVALID_ENCODING),  # an overlong NUL
    ],
)
def test_a_row_is_served_or_has_one_reason(row: Row, reason: Unserved | None) -> None:
    assert reason_not_served(row) is reason


FIELD = st.none() | st.binary(max_size=4) | st.text(max_size=4).map(str.encode)


@given(FIELD, FIELD, FIELD, FIELD)
def test_exactly_the_rows_that_are_utf_8_with_name_and_code_are_served(
    name: bytes | None, kind: bytes | None, interface: bytes | None, code: bytes | None
) -> None:
    served = bool(name) and code is not None
    try:
        for text in (name, kind, interface, code):
            (text or b"").decode("utf-8")
    except UnicodeDecodeError:
        served = False
    assert (reason_not_served(Row(1, name, kind, interface, code)) is None) is served


# -- findings ----------------------------------------------------------------------------------------------------------


def test_findings_count_every_row_and_keep_ten_examples_per_reason() -> None:
    findings = Findings()
    for number in range(1000):
        findings.note(Unserved.DUPLICATE, GOOD._replace(id=number))
        findings.note(Suspect.LARGER_THAN_4_MIB, GOOD._replace(id=number))
    assert findings.unserved == {Unserved.DUPLICATE: 1000}
    assert findings.suspect == {Suspect.LARGER_THAN_4_MIB: 1000}
    assert findings.examples == {
        "duplicate": [f"id={number} name='if'" for number in range(10)],
        "larger_than_4_mib": [f"id={number} name='if'" for number in range(10)],
    }


def test_an_example_shows_any_name_in_one_printable_line() -> None:
    findings = Findings()
    for name in (None, b"", b"\xff", b"a\n\x1b[31m"):
        findings.note(Unserved.NULL_CODE, GOOD._replace(name=name))
    assert findings.examples["null_code"] == [
        "id=1 name=None",
        "id=1 name=''",
        "id=1 name='\ufffd'",
        r"id=1 name='a\n\x1b[31m'",
    ]


def test_the_reasons_are_the_labels_that_metrics_show() -> None:
    labels = {*Unserved, *Suspect}
    assert {str(label) for label in labels} == {
        "null_name", "empty_name", "null_code", "invalid_encoding", "duplicate", "invalid_id", "too_large",
        "interface_invalid", "code_invalid",
        "interface_not_json_array", "larger_than_4_mib", "name_too_long", "code_invalid_here",
    }  # fmt: skip


# -- interfaces --------------------------------------------------------------------------------------------------------
