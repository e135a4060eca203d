"""Settings of servers with a deliberate defect (``broken_process``)."""

from __future__ import annotations

import os
from pathlib import Path

BROKEN = Path(__file__).parent / "broken_process"


def broken(variant: str, settings: dict[str, str]) -> dict[str, str]:
    """``settings`` for a server with the defect ``variant``."""
    path = [str(BROKEN), *filter(None, settings.get("PYTHONPATH", "").split(os.pathsep))]
    return settings | {"PYTHONPATH": os.pathsep.join(path), "PYTHON_DRILL_BROKEN": variant}
