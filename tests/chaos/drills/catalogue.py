"""Every fault that can be rehearsed, by its id."""

from __future__ import annotations

import importlib

from tests.chaos.drills.model import Fault

MODULES = ("faults_database", "faults_process", "faults_machine", "faults_client")
"""Modules of ``tests.chaos``, each with a tuple ``FAULTS``."""


def every_fault() -> dict[str, Fault]:
    """All faults, in the order of `MODULES`.

    Raises: ValueError: two faults have the same id.
    """
    found: dict[str, Fault] = {}
    for module in MODULES:
        for fault in importlib.import_module(f"tests.chaos.{module}").FAULTS:
            if found.setdefault(fault.id, fault) is not fault:
                raise ValueError(f"two faults are called {fault.id}")
    return found
