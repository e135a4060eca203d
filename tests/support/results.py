"""Stores records of measurements and soaks: ``perf/results/<date>-<name>.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "perf" / "results"
SCHEMA = 1
"""Schema of the records of ``python -m perf measure``, which the report reads. Other records have no schema."""


def keep(content: Mapping[str, Any], name: str, folder: Path = RESULTS) -> Path:
    """Write a record under the date of its ``measured`` (ISO 8601, UTC). Returns the file.

    Raises:
        ValueError: for NaN or an infinity, which JSON does not have.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{content['measured'][:10]}-{name}.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def newest(name: str, folder: Path = RESULTS) -> Path | None:
    """The newest record of that name; None if there is none."""
    return max(folder.glob(f"????-??-??-{name}.json"), default=None)
