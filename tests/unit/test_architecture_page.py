"""docs/architecture.md and docs/engine.md show the present rooms of both packages, with their modules and imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service"
ARCHITECTURE = ROOT / "docs/architecture.md"
ENGINE = ROOT / "docs/engine.md"
PACKAGES = ("definition_server", "grpc_h2")
BESIDE = ""
"""The name under which modules beside the rooms are listed."""


def between(page: Path, name: str) -> str:
    (found,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def modules(package: str) -> dict[str, set[str]]:
    """Room → its modules; a module of a subpackage as ``transports/native``."""
    found: dict[str, set[str]] = {}
    top = SERVICE / package
    for path in top.rglob("*.py"):
        room, *inner = path.relative_to(top).with_suffix("").parts
        if inner and inner[-1] != "__init__":
            found.setdefault(room, set()).add("/".join(inner))
        elif not inner and not room.startswith("__"):
            found.setdefault(BESIDE, set()).add(room)
    return found


def on_the_architecture_page() -> dict[str, set[str]]:
    """The list of the rooms of definition_server: it has an item for each room, with names in code marks."""
    items = re.split(r"^- ", between(ARCHITECTURE, "rooms of definition_server"), flags=re.MULTILINE)[1:]
    found = {}
    for item in items:
        names = re.findall(r"`([^`]+)`", item)
        room = next((name for name in names if name.endswith("/")), BESIDE)
        found[room.rstrip("/")] = {name for name in names if name != room}
    return found


def on_the_engine_page() -> dict[str, set[str]]:
    """The tree of grpc_h2: a line for each room, below it indented lines that begin with its modules."""
    found: dict[str, set[str]] = {}
    room = BESIDE
    for line in between(ENGINE, "rooms of grpc_h2").splitlines():
        if heading := re.match(r"(\w+)/", line):
            room = heading[1]
        elif listed := re.match(r"  ((?:\w+\.py(?:, )?)+)", line):
            found.setdefault(room, set()).update(re.findall(r"(\w+)\.py", listed[1]))
    return found


@pytest.mark.parametrize(
    ("package", "listed"), [("definition_server", on_the_architecture_page), ("grpc_h2", on_the_engine_page)]
)
def test_the_page_lists_the_rooms_and_modules_of_a_package(package: str, listed: object) -> None:
    assert callable(listed)
    assert listed() == modules(package)


def imports(package: str) -> Iterator[tuple[str, str]]:
    """Every import of one room from another, or from the other package."""
    top = SERVICE / package
    for path in top.rglob("*.py"):
        parts = path.relative_to(top).parts
        room = parts[0] if len(parts) > 1 else "cli" if parts[0] == "__main__.py" else BESIDE
        if parts == ("__init__.py",):
            continue  # the package's interface
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for first, *rest in (target.split(".") for target in targets):
                if first in PACKAGES and first != package:
                    yield room, first
                elif first == package and rest and (top / rest[0]).is_dir():
                    yield room, rest[0]
                elif first == package and rest and (top / f"{rest[0]}.py").is_file():
                    yield room, BESIDE


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_shows_the_imports_between_the_rooms_of_a_package(package: str) -> None:
    drawn = re.findall(r"^ *(\w+) --> (\w+)$", between(ARCHITECTURE, f"imports of {package}"), re.MULTILINE)
    assert len(drawn) == len(set(drawn))
    actual = {
        (source or "settings", target or "settings") for source, target in set(imports(package)) if source != target
    }
    assert set(drawn) == actual
