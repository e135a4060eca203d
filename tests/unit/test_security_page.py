"""The numbers of `Limits` and of the settings, and the modes of ``JAIL``, are the same in docs/security.md as in the
code."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

from definition_server.environment import default_text, variables
from definition_server.settings import Settings
from grpc_h2 import Limits

PAGE = Path(__file__).parents[2] / "docs/security.md"


def rows(name: str) -> list[tuple[str, str]]:
    """The first two columns of the table between the marks of that name."""
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    found = re.findall(r"^\| `([^`]+)`[^|]*\| ([^|]+) \|", text, re.MULTILINE)
    assert found
    return found


@pytest.mark.parametrize(("limit", "value"), rows("limits"), ids=[row[0] for row in rows("limits")])
def test_a_limit_on_the_page_is_that_of_the_engine(limit: str, value: str) -> None:
    assert f"{getattr(Limits(), limit):,.10g}".replace(".0", "") == value, f"{limit}: correct docs/security.md"


def test_a_setting_on_the_page_has_its_default() -> None:
    fields = {variable: field for field in Settings.model_fields.values() for variable in variables(field)}
    assert {name: default_text(fields[name]) for name, _ in rows("settings")} == dict(rows("settings"))


def test_the_page_lists_every_mode_of_jail() -> None:
    modes = typing.get_args(Settings.model_fields["jail"].annotation)
    assert sorted(name for name, _ in rows("jail modes")) == sorted(modes)
