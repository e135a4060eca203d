"""Families of test cases. The quick session runs a sample of them, and other sessions of CI run the rest
(docs/testing.md)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sample(cases: Iterable[Any], every_run: int | Collection[Any] = 1, *, unpack: bool = False) -> list[Any]:
    """Values for ``pytest.mark.parametrize``, of which all but a few have the marker ``thorough``.

    Args:
        every_run: The cases without that marker, or how many of the first ones have none.
        unpack: Each case is a tuple with a value for each argument.
    """
    chosen = list(cases)
    unmarked = chosen[:every_run] if isinstance(every_run, int) else list(every_run)
    if not unmarked or not all(each in chosen for each in unmarked):
        raise ValueError(f"a sample has at least one case, each one of the family: {unmarked!r}")
    return [
        pytest.param(*(case if unpack else (case,)), marks=() if case in unmarked else pytest.mark.thorough)
        for case in chosen
    ]
