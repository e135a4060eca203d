"""Finds every place where an operator applies, and draws a sample of them by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from tests.mutants.operators import Position, operators
from tests.mutants.rooms import Room


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault."""

    module: Path
    """Relative to the project's root."""
    kind: str
    operator: str
    occurrence: int
    """How many places of this operator come before it in the module."""
    line: int
    statement: tuple[int, ...] = ()
    """The lines of the innermost statement; of a compound one, the lines of the part with the fault."""
    in_function: bool = True
    """Whether it runs when a function is called, not when the module is imported."""

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.operator}#{self.occurrence}"


def places(module: Path, source: str, known: dict[str, dict[str, Operator]]) -> Iterator[Mutant]:
    """Every fault that can be put into ``source``. Annotations and imports that only types need are left out."""
    tree = parso.parse(source)
    nodes = list(ast_nodes(tree))
    for kind, named in known.items():
        for name, operator in named.items():
            occurrence = 0
            for node in nodes:
                for position in operator.mutation_positions(node):
                    if not _unreached(node):
                        yield Mutant(module, kind, name, occurrence, position[0][0], *_statement(node, position))
                    occurrence += 1


_COMPOUND = ("if_stmt", "while_stmt", "for_stmt", "try_stmt", "with_stmt", "match_stmt")


def _statement(node: Any, position: Position) -> tuple[tuple[int, ...], bool]:
    """`Mutant.statement` and `Mutant.in_function` of a fault at ``position`` in ``node``."""
    first, last = position[0][0], _last_line(position[1])
    found = in_function = False
    child, parent = None, node
    while parent is not None:
        if not found and parent.type == "simple_stmt":
            first, last, found = parent.start_pos[0], _last_line(parent.end_pos), True
        elif not found and child is not None and parent.type in _COMPOUND:
            first, last, found = child.start_pos[0], _last_line(child.end_pos), True
        in_function |= parent.type in ("funcdef", "lambdef") and child is parent.children[-1]
        child, parent = parent, parent.parent
    return tuple(range(first, last + 1)), in_function


def _last_line(end: tuple[int, int]) -> int:
    """The end of a statement is the start of the next line."""
    line, column = end
    return line - (column == 0)


def _unreached(node: Any) -> bool:
    """Whether a fault in ``node`` changes nothing: the program never evaluates an annotation, a protocol's method or a
    body under TYPE_CHECKING; a dataclass without slots takes more memory; and 1 more changes a unit, 1e6 or 1e9, by a
    millionth at most."""
    if _only_for_types(node) or _is_unit(node):
        return True
    child, parent = node, node.parent
    while parent is not None:
        annotation = (
            (parent.type == "annassign" and child is parent.children[1])
            or parent.type == "tfpdef"
            or (parent.type == "funcdef" and child is parent.annotation)
            or (parent.type == "argument" and parent.children[0].get_code().strip() == "slots")
        )
        if annotation or _only_for_types(parent) or _is_protocol(parent) or _is_slots(parent):
            return True
        child, parent = parent, parent.parent
    return False


def _only_for_types(node: Any) -> bool:
    return bool(node.type == "if_stmt" and node.children[1].get_code().strip() == "TYPE_CHECKING")


def _is_unit(node: Any) -> bool:
    return bool(node.type == "number" and node.value in ("1e6", "1e9"))


def _is_protocol(node: Any) -> bool:
    if node.type != "classdef":
        return False
    bases = node.get_super_arglist()
    return bases is not None and "Protocol" in bases.get_code()


def _is_slots(node: Any) -> bool:
    first = node.children[0].get_first_leaf().value if node.type == "simple_stmt" else ""
    return bool(first == "__slots__")


def sample(rooms: tuple[Room, ...], tree: Path, count: int, seed: int) -> dict[str, list[Mutant]]:
    """Room → its share of ``count`` faults, with equally many of each kind if possible. The seed decides the choice."""
    known = operators()
    drawn: dict[str, list[Mutant]] = {}
    for number, room in enumerate(rooms):
        choose = random.Random(f"{seed} {room.name}")
        found = [
            mutant for path in room.modules(tree) for mutant in places(path, (tree / path).read_text("utf-8"), known)
        ]
        by_kind = {kind: [mutant for mutant in found if mutant.kind == kind] for kind in known}
        for each in by_kind.values():
            choose.shuffle(each)
        wanted = count // len(rooms) + (number < count % len(rooms))
        picked: list[Mutant] = []
        while len(picked) < wanted and any(by_kind.values()):
            for each in by_kind.values():
                if each and len(picked) < wanted and _compiles(mutant := each.pop(), tree):
                    picked.append(mutant)
        drawn[room.name] = picked
    return drawn


def _compiles(mutant: Mutant, tree: Path) -> bool:
    """False if cosmic-ray mistook something for an operator, such as the star before keyword-only parameters."""
    try:
        compile(mutated(mutant, (tree / mutant.module).read_text("utf-8")), str(mutant.module), "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def mutated(mutant: Mutant, source: str) -> str:
    """``source`` with the fault in it.

    Raises:
        ValueError: there is no such place.
    """
    operator = next(named[mutant.operator] for named in operators().values() if mutant.operator in named)
    text = mutate_code(source, operator, mutant.occurrence)
    if text is None or text == source:
        raise ValueError(f"no such place: {mutant}")
    return str(text)
