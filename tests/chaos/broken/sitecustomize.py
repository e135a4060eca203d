"""Breaks a server on purpose, to show that a drill notices. Python imports this module by itself at the start of every
process whose ``PYTHONPATH`` holds this directory; ``PYTHON_DRILL_BROKEN`` names the variant (a function of
`database_variants`). The prefix is one that the master hands on to its workers."""

from __future__ import annotations

import os

if _variant := os.environ.get("PYTHON_DRILL_BROKEN"):
    import database_variants

    getattr(database_variants, _variant)()
