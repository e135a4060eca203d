"""The rows of docs/requirements.md and the tests that carry their ids, read from the sources.

``python -m tests.support.requirements [ID …]`` lists the tests of these rows, or of all rows.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/requirements.md"
SUITES = ("unit", "fuzz", "simulation", "integration", "judges")
MARKER = "requirement"
_ROW = re.compile(r"^\| ([A-D](?:\d+|-[a-z0-9-]+)) \| (.+) \|$", re.MULTILINE)


class BadMarker(ValueError):
    """A marker whose ids cannot be read from the source."""


def rows(page: str) -> dict[str, str]:
    """Id → the rest of the row. Raises `ValueError` if an id occurs twice."""
    found: dict[str, str] = {}
    for identifier, text in _ROW.findall(page):
        if identifier in found:
            raise ValueError(f"two rows have the id {identifier}")
        found[identifier] = text
    return found


def _ids(decorators: Iterable[ast.expr], where: str) -> Iterator[str]:
    """The ids of the requirement markers among ``decorators``."""
    for decorator in decorators:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if not isinstance(called, ast.Attribute) or called.attr != MARKER:
            continue
        arguments = decorator.args if isinstance(decorator, ast.Call) and not decorator.keywords else []
        if not arguments:
            raise BadMarker(f"{where}: a requirement marker needs ids as positional arguments")
        for argument in arguments:
            if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                raise BadMarker(f"{where}: the id of a requirement is a string literal, not {ast.unparse(argument)}")
            yield argument.value


def _tests(body: Iterable[ast.stmt], prefix: str, inherited: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Name and ids of each test function, those in test classes included."""
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            ids = [*inherited, *_ids(node.decorator_list, f"{prefix}::{node.name}")]
            yield from _tests(node.body, f"{prefix}::{node.name}", ids)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            where = f"{prefix}::{node.name}"
            yield where, [*inherited, *_ids(node.decorator_list, where)]


def marked_tests(sources: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Id → tests that carry it, from pairs of file name and source."""
    found: dict[str, list[str]] = {}
    for name, source in sources:
        if MARKER not in source:
            continue
        for test, ids in _tests(ast.parse(source, name).body, name, []):
            for identifier in ids:
                found.setdefault(identifier, []).append(test)
    return found


def sources() -> Iterator[tuple[str, str]]:
    """Every test module of the suites whose tests can prove a row."""
    for suite in SUITES:
        for path in sorted((ROOT / "tests" / suite).rglob("test_*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()


def differences(page: str, tests: dict[str, list[str]]) -> list[str]:
    """The faults: rows without a test, and markers that name no row."""
    known = rows(page)
    without = [f"{identifier} has no test: {known[identifier]}" for identifier in known if identifier not in tests]
    unknown = [
        f"{identifier} is not in the page: {', '.join(tests[identifier])}" for identifier in tests.keys() - known
    ]
    return without + sorted(unknown)


def main(wanted: list[str]) -> int:
    """Write rows with their tests to the standard output. Returns 1 for an id that is not in the page."""
    known, tests = rows(PAGE.read_text()), marked_tests(sources())
    for identifier in wanted or known:
        if identifier not in known:
            sys.stderr.write(f"{identifier} is not in {PAGE.relative_to(ROOT)}\n")
            return 1
        sys.stdout.write(f"{identifier}: {known[identifier]}\n")
        sys.stdout.writelines(f"    {test}\n" for test in tests.get(identifier, ()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
