"""Writes the figures that ``definition-server capacity`` plans with: ``python -m perf capacity RECORD``.

They come from a record of ``nox -s perf`` (``perf/results/``): the calls per core in each scenario that resembles a
fleet, the knee, and the memory of whole servers. If the record holds no memory figures, ``--memory FILE`` names the
output of ``python -m perf memory``. ``--check`` writes nothing and fails if the file in the package differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from definition_server.cli import sizing
from grpc_h2 import REMEMBERED_ANSWERS

OUTPUT = Path(sizing.__file__).with_name(sizing.FILE)
SERVER = "native"
PLANNED = ("rated", "get-zipf", "deadlines", "upstream-stress")
"""Scenarios that resemble a fleet. The command plans with the most expensive of these scenarios that the record
holds."""
P95_LIMIT_MS = 5.0
"""A worker with a P95 above this (ms) is past its knee, whatever rate it still answers."""
GENERATIONS = 2
"""Generations of remembered answers: a worker drops an answer only when it is in neither of the two."""
MB = 1 << 20
Content = dict[str, Any]
"""A record as JSON."""


class RecordUnusable(Exception):
    """The record lacks a figure that is needed; the text says which one, and how to get it."""


def figures(record: Content, source: str, memory: Sequence[Content] | None = None) -> Content:
    """The content of the file, from ``record``; ``memory`` replaces the record's memory figures.

    Raises:
        RecordUnusable: if a valid measurement is missing.
    """
    points = memory if memory is not None else record.get("memory") or []
    if len({point["definitions"] for point in points}) < 2:
        raise RecordUnusable(
            f"{source} holds no memory figures for two or more sizes of catalogues: run "
            "`python -m perf memory > FILE` and give --memory FILE"
        )
    machine = record["machine"]
    content = {
        "source": source,
        "measured": record["measured"],
        "machine": f"{machine['cpu']}, Linux {machine['kernel']}",
        "per_core": _per_core(record, source),
        "knee": _knee(record),
        "memory": [_point(point) for point in points],
        "kb_per_connection": max(point["kb_per_connection"] for point in points),
        "remembered_answers": GENERATIONS * REMEMBERED_ANSWERS,
    }
    sizing.figures_from(content)
    return content


def _per_core(record: Content, source: str) -> dict[str, float]:
    rates: dict[str, list[float]] = {}
    for run in record.get("runs", []):
        if run["server"] == SERVER and run["scenario"] in PLANNED and run["valid"]:
            rates.setdefault(run["scenario"], []).append(run["per_server_cpu_second"])
    if not rates:
        raise RecordUnusable(f"{source} holds no valid run of {SERVER} in any of {', '.join(PLANNED)}")
    return {name: round(statistics.median(rates[name])) for name in PLANNED if name in rates}


def _knee(record: Content) -> dict[str, float] | None:
    """The last step before the first step that was too slow. Later steps do not count, even if they are fast again."""
    reached = None
    steps = [step for step in record.get("knee") or [] if step.get("server", SERVER) == SERVER]
    for step in sorted(steps, key=lambda step: step["offered_rate"]):
        if not step["valid"] or step["p95"] > P95_LIMIT_MS:
            break
        reached = step
    if reached is None:
        return None
    return {"rate": round(reached["rate"]), "p95_ms": reached["p95"], "p95_limit_ms": P95_LIMIT_MS}


def _point(point: Content) -> Content:
    kept = ("workers", "private_mb_per_worker", "resident_mb", "peak_mb", "publication_cpu_seconds")
    return {"snapshot_mb": round(point["snapshot_octets"] / MB, 2)} | {key: point[key] for key in kept}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the file. Returns 1 if the record is unusable or the file is stale."""
    parser = argparse.ArgumentParser(
        prog="python -m perf capacity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--memory", type=Path, help="the output of `python -m perf memory`")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is stale")
    given = parser.parse_args(arguments)
    try:
        memory = None if given.memory is None else json.loads(given.memory.read_text(encoding="utf-8"))
        made = figures(json.loads(given.record.read_text(encoding="utf-8")), given.record.name, memory)
    except (RecordUnusable, sizing.FiguresError, OSError, ValueError) as error:
        print(f"no figures: {error}", file=sys.stderr)
        return 1
    except (KeyError, TypeError, AttributeError) as error:
        print(f"no figures: {given.record} is not a record of `nox -s perf` ({error!r})", file=sys.stderr)
        return 1
    text = json.dumps(made, indent=1) + "\n"
    if given.check:
        if OUTPUT.exists() and OUTPUT.read_text(encoding="utf-8") == text:
            return 0
        print(f"{OUTPUT.name} is stale: run `python -m perf capacity {given.record}`", file=sys.stderr)
        return 1
    OUTPUT.write_text(text, encoding="utf-8")
    print(f"written: {OUTPUT.name}")
    return 0
