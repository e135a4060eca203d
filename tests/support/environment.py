"""The part of this process's environment that a program under test inherits."""

from __future__ import annotations

import os


def inherited_environment() -> dict[str, str]:
    """PATH, HOME and the variables of coverage.

    A process writes its coverage when it ends. A confined worker cannot do that, so workers are not confined while
    coverage is measured.
    """
    kept = {
        name: value for name, value in os.environ.items() if name in ("PATH", "HOME") or name.startswith("COVERAGE_")
    }
    return kept | ({"JAIL": "off"} if any(name.startswith("COVERAGE_") for name in kept) else {})
