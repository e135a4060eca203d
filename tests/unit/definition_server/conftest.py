"""A check that a test leaves nothing behind, for the modules that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.leftovers import nothing_left


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    with nothing_left():
        yield
