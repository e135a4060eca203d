"""The numbers that a module states: its limits, its times, and the defaults of its public functions and classes.

The numbers are found in the source of the module, so a test that compares all of them cannot forget one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from operator import attrgetter
from pathlib import Path

SERVICE = Path(__file__).parents[2] / "service"
_LONGEST_TABLE = 20
"""The most numbers in a tuple or table. Longer tables are those of a standard; other tests compare them with it."""


def deviations(package: str, stated: Mapping[str, Mapping[str, object]]) -> list[str]:
    """A line for each number on which the modules below ``package`` and the table ``stated`` of a test differ.

    The table has the form module → name → value; modules are named relative to ``package``.
    """
    found = _flat({module: stated_by(f"{package}.{module}") for module in _modules(package)})
    expected = _flat(stated)
    absent = "absent"
    return [
        f"{name} is {found.get(name, absent)}, stated: {expected.get(name, absent)}"
        for name in sorted(found | expected)
        if found.get(name, absent) != expected.get(name, absent)
    ]


def _flat(table: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    return {f"{module}: {name}": value for module, numbers in table.items() for name, value in numbers.items()}


def _modules(package: str) -> list[str]:
    folder = SERVICE.joinpath(*package.split("."))
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py") if path.name != "__init__.py")
    return sorted(".".join(path.parts) for path in paths)


def stated_by(module: str) -> dict[str, object]:
    """Name → value of each number, and of each tuple or table of numbers, that the source of ``module`` states.

    A member of a class is named ``Class.MEMBER``, a default ``Class.field`` or ``function(parameter)``. The defaults of
    private functions and classes are left out.
    """
    tree = ast.parse(SERVICE.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8"))
    found = import_module(module)
    named = {name: attrgetter(name)(found) for name in _constants(tree, "")}
    return {name: value for name, value in named.items() if _is_number(value)} | dict(_defaults(tree, ""))


def _constants(scope: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from _constants(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign) or (isinstance(node, ast.AnnAssign) and isinstance(scope, ast.Module)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value is not None and _states_a_number(node.value):
                names = (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
                yield from (f"{prefix}{name}" for name in names if name.isupper())


def _states_a_number(expression: ast.expr) -> bool:
    """Whether a number is written in ``expression``. A ``range`` only numbers names, so it states no number."""
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name) and expression.func.id == "range":
        return False
    return any(isinstance(node, ast.Constant) and _is_number(node.value) for node in ast.walk(expression))


def _is_number(value: object) -> bool:
    if isinstance(value, tuple | dict):
        numbers = value.values() if isinstance(value, dict) else value
        return 0 < len(value) <= _LONGEST_TABLE and all(map(_is_number, numbers))
    return isinstance(value, int | float)


def _defaults(scope: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, object]]:
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from () if node.name.startswith("_") else _defaults(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(scope, ast.ClassDef):
            name = ast.unparse(node.target)
            yield from () if name.startswith("_") else _default(f"{prefix}{name}", node.value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.name == "__init__" or not node.name.startswith("_")
        ):
            given = node.args
            positional = [*given.posonlyargs, *given.args]
            with_default = positional[len(positional) - len(given.defaults) :]
            for parameter, default in (
                *zip(with_default, given.defaults, strict=True),
                *zip(given.kwonlyargs, given.kw_defaults, strict=True),
            ):
                yield from _default(f"{prefix}{node.name}({parameter.arg})", default)


def _default(name: str, expression: ast.expr | None) -> Iterator[tuple[str, object]]:
    parts = () if expression is None else ast.walk(expression)
    if expression is not None and all(isinstance(part, _OF_NUMBERS) for part in parts):
        value = eval(compile(ast.Expression(expression), name, "eval"), {})
        if _is_number(value):
            yield name, value


_OF_NUMBERS = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop)
