"""An environment that holds only given variables, and the settings that are read from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from definition_server.cli.client_settings import ClientSettings
from definition_server.environment import SettingsError, load_settings, variables
from definition_server.settings import Settings

REQUIRED = {"DATABASE_URL": "postgresql://reader:pw@db:5432/avap", "API_KEY": "key-of-clients"}

MARK = "hunter2"
"""Part of every secret that a test looks for."""

DECLARATIONS = (Settings, ClientSettings)
FIELDS = [(cls, name) for cls in DECLARATIONS for name in cls.model_fields]


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """An environment in which only ``values`` concern the settings."""
    known = {name for cls, field in FIELDS for name in variables(cls.model_fields[field])}
    with pytest.MonkeyPatch.context() as patch:
        for name in known | {f"{name}_FILE" for name in known}:
            patch.delenv(name, raising=False)
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def load(**values: str) -> Settings:
    """The settings from the required variables and ``values``."""
    with environment(**{**REQUIRED, **values}):
        return load_settings(Settings)


def failure(**values: str) -> SettingsError:
    """The error that refuses the settings from the required variables and ``values``."""
    with pytest.raises(SettingsError) as caught:
        load(**values)
    return caught.value


def secret_file(folder: Path, content: bytes) -> str:
    path = folder / "secret"
    path.write_bytes(content)
    return str(path)
