"""Every link of the documentation has a target, and every file that it names exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
NAME = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|proto|sql|toml|j2))`")
DOTTED = re.compile(r"\b((?:definition_server|grpc_h2|perf|tests)(?:\.\w+)+)")
NOT_OURS = {"structlog.py", "NAME.py"}
"""A module of a library, and a placeholder."""
WRITTEN = ("deploy/compose/secrets",)
"""Files that commands make, which are not part of the repository."""
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


def sources() -> Iterator[str]:
    """The files of the project by their path, without those of its environments."""
    for top in ("service", "tests", "perf", "proto", "deploy", "docs"):
        yield from (path.relative_to(ROOT).as_posix() for path in (ROOT / top).rglob("*.*"))
    yield from (path.name for path in ROOT.glob("*.*"))


def unknown_names(text: str, known: frozenset[str]) -> list[str]:
    """The files and modules that ``text`` names, in full or by the end of their path, and that are not among
    ``known``."""
    files = [name for name in NAME.findall(text) if name not in NOT_OURS and f"/{name}" not in known]
    modules = [
        name
        for name in DOTTED.findall(text)
        if not any(f"/{'/'.join(parts)}{end}" in known for parts in prefixes(name) for end in (".py", "/__init__.py"))
    ]
    return files + modules


def prefixes(dotted: str) -> list[list[str]]:
    """The parts of ``a.b.c`` as a module and, because the last part may be a name in the module, also without that
    part."""
    parts = dotted.split(".")
    return [parts, parts[:-1]] if len(parts) > 2 or parts[-1][0].isupper() else [parts]


@pytest.fixture(scope="module")
def known() -> frozenset[str]:
    """Every end of every path, as ``/catalog/wire.py``."""
    paths = (f"/{path}" for path in sources())
    return frozenset(path[at:] for path in paths for at, sign in enumerate(path) if sign == "/")


@each_page
def test_every_module_that_a_page_names_by_the_end_of_its_path_exists(page: Path, known: frozenset[str]) -> None:
    if page not in HISTORY:
        assert unknown_names(page.read_text(encoding="utf-8"), known) == []


@pytest.mark.parametrize(
    "text",
    ["`catalog/no_such.py`", "`no_such.py`", "`ipc/wire.py`", "definition_server.no_such.wire", "`tests.no_such`"],
)
def test_a_stale_name_of_a_module_is_found(text: str, known: frozenset[str]) -> None:
    assert len(unknown_names(text, known)) == 1


@pytest.mark.parametrize(
    "text",
    ["`catalog/wire.py`", "`wire.py`", "definition_server.catalog.wire", "definition_server.catalog.wire.NAME"],
)
def test_the_name_of_an_existing_module_is_not_reported(text: str, known: frozenset[str]) -> None:
    assert unknown_names(text, known) == []


def test_the_index_of_the_documentation_links_every_page() -> None:
    index = ROOT / "docs/README.md"
    linked = set(re.findall(r"\]\(([^)#]+\.md)\)", index.read_text(encoding="utf-8")))
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/decisions").glob("*.md")]
    assert {path.relative_to(index.parent).as_posix() for path in pages if path != index} <= linked


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#no-heading) [c](nowhere.md) [d](page.md#a-heading)\n")
    assert broken_links(page) == ["#no-heading", "nowhere.md"]
