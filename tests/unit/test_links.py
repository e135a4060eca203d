"""Every link of the documentation has a target, and every file that it names exists."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.support.pages import broken_links

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "deploy").rglob("*.md")),
]  # fmt: skip
HISTORY = {ROOT / "CHANGELOG.md"}
"""Pages that may name files of former versions."""
FILE = re.compile(r"(?<![\w/.-])((?:deploy|docs|perf|proto|service|tests)/[\w./-]*\w)")
MODULE = re.compile(r"python3? -m ((?:perf|tests|definition_server)[\w.]*)")
WRITTEN = ("deploy/compose/secrets",)
"""Made by commands, not part of the repository."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@each_page
def test_every_link_of_a_page_has_a_target(page: Path) -> None:
    assert broken_links(page) == []


@each_page
def test_every_file_and_module_that_a_page_names_exists(page: Path) -> None:
    if page in HISTORY:
        return
    text = page.read_text(encoding="utf-8")
    files = [name for name in FILE.findall(text) if not name.startswith(WRITTEN)]
    assert [name for name in files if not (ROOT / name).exists() and not (page.parent / name).exists()] == []
    assert [name for name in MODULE.findall(text) if find_spec(name) is None] == []


def test_the_index_of_the_documentation_links_every_page() -> None:
    index = ROOT / "docs/README.md"
    linked = set(re.findall(r"\]\(([^)#]+\.md)\)", index.read_text(encoding="utf-8")))
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/decisions").glob("*.md")]
    assert {path.relative_to(index.parent).as_posix() for path in pages if path != index} <= linked


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#no-heading) [c](nowhere.md) [d](page.md#a-heading)\n")
    assert broken_links(page) == ["#no-heading", "nowhere.md"]
