"""Ids of parametrized tests are short and printable for any value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import h2_wire as wire
from tests.support.parameter_ids import LONGEST, parameter_id


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (wire.ping(), "PING(8)"),
        (wire.data(1, b"x") + wire.rst_stream(1), "DATA(1) on 1, RST_STREAM(4) on 1"),
        (wire.HELLO, "preface, SETTINGS(0)"),
        (wire.frame(0x42), "type 0x42(0)"),
        (b"trailers", "trailers"),
        (b"\xbe\x00", "be00"),
        ("caf\xe9", r"caf\xe9"),
        ("plain", None),
        (b"", None),
        (3, None),
    ],
    ids=range(10),
)
def test_a_value_has_a_readable_id(value: object, wanted: str | None) -> None:
    assert parameter_id(value) == wanted


@given(st.binary() | st.text())
def test_any_value_has_a_short_printable_id(value: bytes | str) -> None:
    named = parameter_id(value)
    if named is None:
        assert not value or (isinstance(value, str) and len(value) <= LONGEST)
    else:
        assert len(named) <= LONGEST
        assert named.isascii()
        assert named.isprintable()
