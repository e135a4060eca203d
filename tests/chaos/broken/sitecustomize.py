"""Gives a server a deliberate defect, to show that a drill detects it. Python imports this module at the start of every
process whose ``PYTHONPATH`` has this directory; ``PYTHON_DRILL_BROKEN`` names the variant (a function of
`database_variants`). The master passes variables with this prefix to its workers.
"""

from __future__ import annotations

import os

if _variant := os.environ.get("PYTHON_DRILL_BROKEN"):
    import database_variants

    getattr(database_variants, _variant)()
