"""Manifests, rendered once per session; databases whose role for the server is removed with them."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from tests.deploy.manifests import Manifests
from tests.deploy.tools import KUBERNETES, render
from tests.support.providers import DatabaseServer, create_database, drop_database

_numbers = itertools.count()

OVERLAYS = tuple(sorted(path.name for path in (KUBERNETES / "overlays").iterdir()))


@cache
def _rendered(folder: Path) -> list[dict[str, Any]]:
    return render(folder)


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """Each overlay in turn."""
    return str(request.param)


@pytest.fixture
def manifests(overlay: str) -> Manifests:
    """The rendered manifests; a copy, so that a test may change it."""
    return Manifests(copy.deepcopy(_rendered(KUBERNETES / "overlays" / overlay)))


@pytest.fixture
def guide() -> Manifests:
    """The overlay ``guide``; a copy."""
    return Manifests(copy.deepcopy(_rendered(KUBERNETES / "overlays/guide")))


@pytest.fixture
def database(every_postgres: DatabaseServer) -> Iterator[str]:
    """A database on each provider; afterwards neither it nor the roles of these tests are left."""
    name = f"deploy_{os.getpid()}_{next(_numbers)}"
    yield create_database(every_postgres.url, name)
    drop_database(every_postgres.url, name)
    with psycopg.connect(every_postgres.url, autocommit=True) as connection:
        for role in ("definition_server", "owner_of_the_table"):
            connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))
