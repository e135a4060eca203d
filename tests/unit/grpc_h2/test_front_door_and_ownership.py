"""Checks two rules in the sources of the engine: its public interface is documented, and a connection's state is
changed only by its owner.

In ``connection`` an object changes only its own attributes, so no attribute is written from two modules. The layers are
in ``tests/unit/test_layers.py``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import grpc_h2

ROOT = Path(grpc_h2.__file__).parent
MUTATORS = {
    "append", "extend", "insert", "pop", "popitem", "popleft", "remove", "clear", "update", "setdefault", "add",
    "discard", "appendleft", "__setitem__", "__delitem__",
}  # fmt: skip


def sources(*below: str) -> dict[str, ast.Module]:
    """Module name → syntax tree, for every module of the package or of some of its layers."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).with_suffix("")
        if not below or relative.parts[0] in below:
            name = ".".join(("grpc_h2", *relative.parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def test_every_name_of_the_front_door_exists_and_is_documented() -> None:
    documentation = grpc_h2.__doc__ or ""
    assert sorted(grpc_h2.__all__, key=lambda name: (name != name.upper(), name[0].islower(), name)) == grpc_h2.__all__
    for name in grpc_h2.__all__:
        assert getattr(grpc_h2, name) is not None
        assert f"`{name}`" in documentation, f"{name} is not documented"
    with pytest.raises(AttributeError, match="Nothing"):
        _ = grpc_h2.Nothing


def test_the_sans_io_part_of_the_front_door_needs_no_event_loop() -> None:
    program = (
        "import sys; before = set(sys.modules); import grpc_h2; grpc_h2.Connection;"
        " print({'asyncio', 'ssl', 'socket'} & (set(sys.modules) - before))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


# -- ownership ---------------------------------------------------------------------------------------------------------


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Assign):
        yield from node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        yield node.target
    elif isinstance(node, ast.Delete):
        yield from node.targets
    elif isinstance(node, ast.For | ast.AsyncFor):
        yield node.target


def _flat(target: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, ast.Tuple | ast.List):
        for element in target.elts:
            yield from _flat(element)
    else:
        yield target


def foreign_changes(tree: ast.AST) -> list[str]:
    """Changes of other objects' attributes: by assignment, by an element, or by a mutating method of a container."""
    found = []
    for node in ast.walk(tree):
        for target in (flat for each in _targets(node) for flat in _flat(each)):
            holder = target.value if isinstance(target, ast.Subscript) else target
            if isinstance(holder, ast.Attribute) and not _is_self(holder.value):
                found.append(f"line {node.lineno}: {ast.unparse(target)} = …")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            holder = node.func.value
            if isinstance(holder, ast.Attribute) and not _is_self(holder.value):
                found.append(f"line {node.lineno}: {ast.unparse(node.func)}()")
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not _is_self(node.value):
            found.append(f"line {node.lineno}: {ast.unparse(node)} is private to another object")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            found.append(f"line {node.lineno}: setattr")
    return found


def test_an_object_of_the_connection_changes_its_own_attributes_only() -> None:
    checked = 0
    for name, tree in sources("connection").items():
        if name == "grpc_h2.connection.state":  # the members of an enum get their `following` when the enum is complete
            continue
        assert foreign_changes(tree) == [], name
        checked += 1
    assert checked >= 15


def test_a_part_of_the_connection_inherits_from_no_other() -> None:
    allowed = {"Enum", "NamedTuple"}
    for name, tree in sources("connection").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert {ast.unparse(base) for base in node.bases} <= allowed, f"{name}: {node.name}"


def test_aliases_of_containers_of_other_parts_are_only_read() -> None:
    """The rule above does not find changes by a local name for ``other.attribute``."""
    for name, tree in sources("connection").items():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            aliases = set()
            for node in ast.walk(function):
                if isinstance(node, ast.Assign):
                    value = node.value
                    for target in node.targets:
                        both = (
                            zip(target.elts, value.elts, strict=True)
                            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                            else [(target, value)]
                        )
                        for one, its in both:
                            if isinstance(one, ast.Name) and isinstance(its, ast.Attribute) and not _is_self(its.value):
                                aliases.add(one.id)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                    holder = node.func.value
                    assert not (isinstance(holder, ast.Name) and holder.id in aliases), f"{name}:{node.lineno}"
                for target in _targets(node):
                    if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                        assert target.value.id not in aliases, f"{name}:{node.lineno}"


@pytest.mark.parametrize(
    "text",
    [
        "def f(self, stream):\n    stream.unread += 1",
        "def f(self):\n    self._sender.window = 5",
        "def f(self):\n    a, self._streams.last_id = 1, 2",
        "def f(self):\n    self._sender.out.append(b'')",
        "def f(self):\n    self._streams.pending[1] = None",
        "def f(self):\n    del self._streams.open[1]",
        "def f(self, other):\n    return other._window",
        "def f(self, other):\n    setattr(other, 'x', 1)",
    ],
)
def test_a_change_of_another_objects_attribute_is_found(text: str) -> None:
    assert len(foreign_changes(ast.parse(text))) == 1


def test_a_change_of_an_own_attribute_is_not_reported() -> None:
    own = "def f(self, other):\n    self.a += other.b\n    self.c[1] = 2\n    self.d.append(3)\n    other.method()"
    assert foreign_changes(ast.parse(own)) == []
