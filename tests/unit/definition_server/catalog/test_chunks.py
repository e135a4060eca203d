"""The number of octets that are hashed and written at once is limited, whatever the size of the pieces."""

from __future__ import annotations

import pytest

from definition_server.catalog.assembly import chunks

MEBIBYTE, LONG = 1 << 20, 64 << 10


@pytest.mark.parametrize("size", [1000, LONG, LONG + 1, 3 * MEBIBYTE])
def test_chunks_have_about_a_mebibyte_and_hold_all_octets_in_order(size: int) -> None:
    pieces: list[bytes | memoryview] = [bytes([number % 251]) * size for number in range(1 + 5 * MEBIBYTE // size)]
    whole = b"".join(pieces)
    made = list(chunks(pieces))
    assert b"".join(made) == whole
    assert max(map(len, made)) < MEBIBYTE + LONG
    assert not pieces, "each piece was removed from the list, so that it can be freed"
