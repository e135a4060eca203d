"""Outcomes as a table for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from tests.chaos.drills.judge import doubts, judge, verdict
from tests.chaos.drills.model import Outcome

HEADINGS = (
    "fault", "transport", "database", "offered", "failed", "failed with retry", "worst ms", "fresh s", "memory MiB",
    "verdict",
)  # fmt: skip
_LEFT = {0, 1, 2, 9}


def row(outcome: Outcome) -> tuple[str, ...]:
    """One line of the table."""
    before, after = outcome.before, outcome.after
    memory = "-" if before is None or after is None else f"{before.memory_bytes >> 20} → {after.memory_bytes >> 20}"
    return (
        outcome.title,
        outcome.transport,
        outcome.database,
        str(outcome.load.offered),
        str(outcome.load.plain.lost),
        str(outcome.load.retrying.lost),
        f"{outcome.load.worst_ms:.0f}",
        "-" if outcome.fresh_seconds is None else f"{outcome.fresh_seconds:.1f}",
        memory,
        verdict(outcome),
    )


def text_table(outcomes: Iterable[Outcome]) -> str:
    """All outcomes, one per line; below them the broken promises and the doubts."""
    outcomes = list(outcomes)
    rows = [HEADINGS, *(row(each) for each in outcomes)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(HEADINGS))]
    lines = [_line(each, widths) for each in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    offered = sum(each.load.offered for each in outcomes)
    lost = sum(each.load.lost for each in outcomes)
    lines.append(f"{len(outcomes)} drills, {offered} calls offered, {lost} failed")
    for each in outcomes:
        told = [*judge(each), *doubts(each)]
        lines += [f"{each.fault} ({each.transport}, {each.database}): {sentence}" for sentence in told]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.ljust(width) if column in _LEFT else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()


def to_json(outcome: Outcome) -> dict[str, Any]:
    """One outcome, with its verdict."""
    found = asdict(outcome)
    found["allows"] |= {"plain": outcome.allows.plain.value, "retried": outcome.allows.retried.value}
    return found | {"verdict": verdict(outcome), "broken": judge(outcome), "doubts": doubts(outcome)}
