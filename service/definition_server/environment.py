"""Reads the environment into typed settings, secrets from files too, and reports every problem with its remedy.

The only reader of ``os.environ``. `settings` declares the settings, as fields of a subclass of `EnvironmentSettings`:
a field's description says what it does, and its `advice` what to write when a value is refused. A secret ``X`` may
come from a file instead, which ``X_FILE`` names (trailing newlines are dropped).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AliasChoices, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

EX_CONFIG = 78
"""Exit code for an invalid environment (sysexits.h EX_CONFIG), to distinguish it from a crash."""


def forget_libpq_variables() -> None:
    """Remove ``PGSERVICE``, ``PGSSLMODE`` and their like, which libpq adds to every address that it is given.

    For a database of our own, whose address is complete; these variables describe other servers of the user.
    """
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of the environment: the variable, its value (masked where secret), the reason and the remedy."""

    variable: str
    value: str | None
    reason: str
    remedy: str

    def __str__(self) -> str:
        shown = "is not set" if self.value is None else f"= {self.value!r}"
        return f"{self.variable} {shown}: {self.reason}. {self.remedy}"


class SettingsError(Exception):
    """The environment cannot be used. ``problems`` holds every problem, not only the first."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def advice(text: str, *, secret: bool = False) -> dict[str, Any]:
    """A field's ``json_schema_extra``: what to write when a value is refused, and whether values must stay hidden."""
    return {"remedy": text, "secret": secret}


class _SecretFiles(PydanticBaseSettingsSource):
    """Secrets from the files that ``<VARIABLE>_FILE`` names. `_file_problems` reports files that cannot be read."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable = variables(field)[0]
        path = os.environ.get(f"{variable}_FILE")
        if not path or not is_secret(field):
            return None, variable, False
        try:
            return Path(path).read_text(encoding="utf-8").rstrip("\r\n"), variable, False
        except (OSError, UnicodeDecodeError):
            return None, variable, False

    def __call__(self) -> dict[str, Any]:
        found = (self.get_field_value(field, name) for name, field in self.settings_cls.model_fields.items())
        return {variable: value for value, variable, _ in found if value}


class EnvironmentSettings(BaseSettings):
    """Settings that are read once from the environment, or from files where they are secret. Immutable."""

    model_config = SettingsConfigDict(
        case_sensitive=True, env_ignore_empty=True, extra="ignore", frozen=True, validate_default=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _SecretFiles(settings_cls)


AnySettings = TypeVar("AnySettings", bound=EnvironmentSettings)


def load_settings(
    cls: type[AnySettings], *, defaults: Mapping[str, str] | None = None, **overrides: str
) -> AnySettings:
    """Read ``cls`` from the environment.

    Args:
        cls: The declaration of the settings.
        defaults: By variable name, for variables that the environment does not set.
        overrides: By variable name; they take precedence over the environment.

    Raises:
        SettingsError: holds every problem.
    """
    problems = [problem for problem in _file_problems(cls) if problem.variable.removesuffix("_FILE") not in overrides]
    unreadable = {problem.variable.removesuffix("_FILE") for problem in problems}
    try:
        settings = cls(**_unset(cls, defaults or {}), **overrides)
    except ValidationError as error:
        found = [_problem(cls, dict(detail)) for detail in error.errors()]
        problems += [problem for problem in found if problem.variable not in unreadable]
        raise SettingsError(problems) from None
    if problems:
        raise SettingsError(problems)
    return settings


def variables(field: FieldInfo) -> tuple[str, ...]:
    """The environment variables that set ``field``, in order of precedence."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return tuple(str(choice) for choice in alias.choices)
    return (str(alias),)


def remedy(field: FieldInfo) -> str:
    """What to write when the value of ``field`` is refused."""
    extra = field.json_schema_extra
    return str(extra["remedy"]) if isinstance(extra, dict) else ""


def is_secret(field: FieldInfo) -> bool:
    """Whether the value must never be shown, and may come from a file."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra["secret"])


def default_text(field: FieldInfo) -> str:
    """The default as the reference page shows it."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "CPUs granted"
    if field.default is None:
        return "unset"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def effective(settings: EnvironmentSettings) -> dict[str, str | None]:
    """Variable → effective value, secrets masked, in the order of the declaration."""
    values: dict[str, str | None] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        shown = _shown(field, value.get_secret_value() if isinstance(value, SecretStr) else value)
        values[variables(field)[0]] = shown
    return values


def inherited_environment(names: tuple[str, ...], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The variables for a child process: those in ``names``, and those that start with one of ``prefixes``."""
    return {name: value for name, value in os.environ.items() if name in names or name.startswith(prefixes)}


def _unset(cls: type[EnvironmentSettings], defaults: Mapping[str, str]) -> dict[str, str]:
    """The ``defaults`` of variables that the environment does not set, under any of their names or by a file."""
    kept = dict(defaults)
    for field in cls.model_fields.values():
        names = variables(field)
        if any(os.environ.get(name) for name in (*names, f"{names[0]}_FILE")):
            kept.pop(names[0], None)
    return kept


def _shown(field: FieldInfo, value: object) -> str | None:
    if value is None:
        return None
    if is_secret(field):
        return "********"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _file_problems(cls: type[EnvironmentSettings]) -> list[Problem]:
    problems = []
    for field in cls.model_fields.values():
        variable = variables(field)[0]
        path = os.environ.get(f"{variable}_FILE")
        if not path or not is_secret(field):
            continue
        if os.environ.get(variable):
            reason, action = f"{variable} is set as well", f"Set only one of {variable} and {variable}_FILE"
        else:
            try:
                content = Path(path).read_text(encoding="utf-8")
            except OSError as error:
                reason, action = (
                    f"it cannot be read ({error.strerror})",
                    "Name a file that the server may read",
                )
            except UnicodeDecodeError:
                reason, action = "its content is not UTF-8 text", "Write the secret as text"
            else:
                if content.strip():
                    continue
                reason, action = "the file is empty", "Write the secret into it"
        problems.append(Problem(f"{variable}_FILE", path, reason, action))
    return problems


def _problem(cls: type[EnvironmentSettings], detail: dict[str, Any]) -> Problem:
    location = str(detail["loc"][0])
    field = next(f for name, f in cls.model_fields.items() if location in (name, *variables(f)))
    variable = next((v for v in variables(field) if os.environ.get(v)), variables(field)[0])
    value = None if detail["type"] == "missing" else _shown(field, detail.get("input"))
    reason = "it is required" if detail["type"] == "missing" else _lower_first(str(detail["msg"]))
    return Problem(variable, value, reason, remedy(field))


def _lower_first(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]  # a variable's name keeps its capitals
