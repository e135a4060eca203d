"""The kinds of faults: which of cosmic-ray's operators are used, and two of our own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import parso.python.tree
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator

Position = tuple[tuple[int, int], tuple[int, int]]

COMPARISONS = (
    "Eq_NotEq",
    "NotEq_Eq",
    "Lt_LtE",
    "LtE_Lt",
    "Gt_GtE",
    "GtE_Gt",
    "Lt_GtE",
    "GtE_Lt",
    "Is_IsNot",
    "IsNot_Is",
)
"""From → to. Replacements that change a comparison at its boundary or negate it; ``==`` into ``is`` shows nothing."""
ARITHMETIC = ("Add_Sub", "Sub_Add", "Mul_FloorDiv", "FloorDiv_Mul", "Mod_Mul", "BitAnd_BitOr", "LShift_RShift")


class DeleteStatement(Operator):
    """A call whose result is not used, or an assignment, becomes ``pass``."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        """Where: see `Operator.mutation_positions`."""
        if node.type == "simple_stmt" and _is_statement(node.children[0]):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Replace the statement. Its line stays, so that line numbers do not change."""
        first = node.children[0]
        prefix = first.get_first_leaf().prefix
        node.children[0] = parso.python.tree.Keyword("pass", first.start_pos, prefix=prefix)
        return node

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """See `Operator.examples`."""
        return (Example("f()\n", "pass\n"), Example("x.y = 1\n", "pass\n"), Example("x += 1\n", "pass\n"))


def _is_statement(node: Any) -> bool:
    """A call, an ``await`` of one, or an assignment to something that exists already: deleting it causes no
    NameError."""
    if node.type in ("atom_expr", "power"):
        return bool(node.children[-1].type == "trailer" and node.children[-1].children[0].value == "(") or (
            node.children[0].type == "keyword" and node.children[0].value == "await"
        )
    if node.type != "expr_stmt":
        return False
    target, operator = node.children[0], node.children[1]
    if operator.type == "annassign":
        return False
    augmented = operator.type == "operator" and operator.value != "="
    return bool(augmented or target.type in ("atom_expr", "power"))


class ReplaceReturn(Operator):
    """``return x`` returns None; `ReplaceTrueWithFalse` swaps ``return True`` and ``return False``."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        """Where: see `Operator.mutation_positions`."""
        if node.type == "return_stmt" and node.children[1].get_code().strip() not in ("None", "True", "False"):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Replace the value."""
        node.children[1] = parso.python.tree.Keyword("None", node.children[1].start_pos, prefix=" ")
        return node

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """See `Operator.examples`."""
        return (Example("def f():\n    return 1\n", "def f():\n    return None\n"),)


def operators() -> dict[str, dict[str, Operator]]:
    """Kind of fault → name of an operator → the operator."""
    core = {
        "comparison": [f"ReplaceComparisonOperator_{pair}" for pair in COMPARISONS],
        "condition": ["AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceUnaryOperator_Delete_Not",
                      "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"],
        "constant": ["NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"],
        "arithmetic": [f"ReplaceBinaryOperator_{pair}" for pair in ARITHMETIC],
    }  # fmt: skip
    made = {kind: {name: get_operator(f"core/{name}")() for name in names} for kind, names in core.items()}
    return made | {"return": {"ReplaceReturn": ReplaceReturn()}, "deletion": {"DeleteStatement": DeleteStatement()}}
