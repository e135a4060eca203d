"""After a large catalogue was read, its pages and the freed heap are returned to the kernel. After a small catalogue
nothing is returned.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, cast

import pytest

from definition_server.control_plane import resident_memory
from definition_server.control_plane.resident_memory import give_back, give_back_heap


@pytest.mark.parametrize("glibc", [True, False], ids=["glibc", "another C library"])
def test_freed_pages_of_the_heap_are_returned_if_the_c_library_can_do_it(
    glibc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    library = SimpleNamespace(malloc_trim=kept.append) if glibc else SimpleNamespace()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    give_back_heap()
    assert kept == ([0] if glibc else [])


@pytest.mark.parametrize(
    ("size", "heap", "given_back"),
    [
        (16 * 1024 * 1024, True, ["pages", "heap"]),
        (16 * 1024 * 1024, False, ["pages"]),
        (16 * 1024 * 1024 - 1, True, []),
    ],
    ids=["large", "only its pages", "small"],
)
def test_after_a_large_catalogue_pages_are_given_back_and_the_heap_on_request(
    size: int, heap: bool, given_back: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(resident_memory, "give_back_heap", lambda: found.append("heap"))
    snapshot = cast(Any, SimpleNamespace(size=size, release_pages=lambda: found.append("pages")))
    give_back(snapshot, heap=heap)
    assert found == given_back
