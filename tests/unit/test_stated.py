"""A number that changed, that no table states, or that no module has any more is reported."""

from __future__ import annotations

import pytest
from tests.support import stated


@pytest.mark.parametrize(
    ("table", "reported"),
    [
        ({"reading": {"MOST": 3, "read(limit)": 2}}, []),
        ({"reading": {"MOST": 4, "read(limit)": 2}}, ["reading: MOST is 3, stated: 4"]),
        ({"reading": {"MOST": 3}}, ["reading: read(limit) is 2, stated: absent"]),
        (
            {"reading": {"MOST": 3, "LEAST": 1, "read(limit)": 2}, "writing": {"MOST": 3}},
            ["reading: LEAST is absent, stated: 1", "writing: MOST is absent, stated: 3"],
        ),
    ],
)
def test_only_the_numbers_that_differ_are_reported(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, dict[str, object]], reported: list[str]
) -> None:
    numbers = {"room.reading": {"MOST": 3, "read(limit)": 2}, "room.names": {}}
    monkeypatch.setattr(stated, "_modules", lambda _: ["reading", "names"])
    monkeypatch.setattr(stated, "stated_by", numbers.__getitem__)
    assert stated.deviations("room", table) == reported
