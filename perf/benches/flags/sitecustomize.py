"""Records events of a server's runtime. Python imports this module first, in master and workers, because
`perf.benches.runtime_flags` puts it first on ``PYTHONPATH``.

It records every collection of the garbage collector in a worker and the modules that are imported after the warm-up,
and writes both to a file when the process ends. ``PYTHON_FLAGS_VARIANT`` chooses the worker's variant. The server
itself contains none of this. (The names begin with PYTHON because only such variables reach the workers.)
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import time
from pathlib import Path

_pauses: dict[int, list[float]] = {0: [], 1: [], 2: []}
_began = 0.0
_known: set[str] = set()
_freeze = gc.freeze


def _note(phase: str, info: dict[str, int]) -> None:
    global _began
    if phase == "start":
        _began = time.perf_counter()
    else:
        _pauses[info["generation"]].append(time.perf_counter() - _began)


def _warm() -> None:
    """Called when the warm-up is over. From now on, every delay affects clients."""
    _known.update(sys.modules)
    for found in _pauses.values():
        found.clear()
    gc.callbacks.append(_note)


def _freeze_and_note() -> None:
    if VARIANT != "no freeze":
        _freeze()
    if VARIANT in _THRESHOLDS:
        gc.set_threshold(*_THRESHOLDS[VARIANT])
        gc.set_threshold = lambda *_: None  # otherwise the warm-up would set its own thresholds later
    if VARIANT == "no collections":
        gc.disable()
    _warm()


def _write(directory: str) -> None:
    pauses = {generation: list(found) for generation, found in _pauses.items()}
    began = time.perf_counter()
    gc.collect()
    record = {
        "pauses": pauses,
        "full": time.perf_counter() - began,
        "late_modules": sorted(set(sys.modules) - _known) if _known else None,
        "tracked": len(gc.get_objects()),
        "frozen": gc.get_freeze_count(),
    }
    Path(directory, f"{os.getpid()}.json").write_text(json.dumps(record), encoding="utf-8")


_THRESHOLDS = {"usual collections": (700, 10, 10), "rare collections": (50_000, 20, 100)}
VARIANT = os.environ.get("PYTHON_FLAGS_VARIANT", "as it is")

if any("data_plane.worker" in word for word in sys.orig_argv):
    gc.freeze = _freeze_and_note
    if VARIANT == "no warm-up":
        from definition_server.data_plane import warmup

        async def _nothing(self: object) -> None:
            _warm()

        warmup.WarmUp.run = _nothing  # type: ignore[method-assign]  # the variant
    atexit.register(_write, os.environ["PYTHON_FLAGS_OUT"])
