"""Reads the environment into typed settings, secrets from files too, and reports every problem with its remedy.

The only reader of ``os.environ``. `settings` declares the settings, as fields of a subclass of `EnvironmentSettings`:
a field's description explains the setting, and its `advice` is the remedy when a value is refused. A secret ``X`` may
come from the file that ``X_FILE`` names instead.

White space around a value is dropped. Around a secret, from a variable or a file, only line ends and a byte order mark
are dropped, and other white space is refused. A value of white space alone counts as unset. Choices (as ``LOG_LEVEL``)
may be in any case.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EISDIR
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args, get_origin

from pydantic import AliasChoices, BaseModel, ConfigDict, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from definition_server.inherited import interpreter

EX_CONFIG = 78
"""Exit code for an invalid environment (sysexits.h EX_CONFIG), to distinguish it from a crash."""

Check: TypeAlias = Callable[[str], str | None]
"""Value → the reason why it is refused, which does not contain the value; None if it is accepted."""

_BYTE_ORDER_MARK = "\ufeff"
_LARGEST_SECRET_FILE = 1024 * 1024
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DIGITS = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_WITH_UNIT = re.compile(r"[+-]?[0-9][0-9.,_]*\s*[a-zA-Z%µ]+")
_SEPARATED = re.compile(r"[+-]?[0-9][0-9.,_' ]*")
_USER_INFORMATION = re.compile(r"((?:[a-zA-Z][a-zA-Z0-9+.-]*:)?//).*@|[^/:@]+:.*@", re.DOTALL)
"""Up to the last @, because a password that was not percent-encoded may have any character. A path is not a URL."""
_FLAGS = ("true", "false", "1", "0", "yes", "no", "on", "off", "t", "f", "y", "n")

_SIMILARITY = 0.85
"""The least similarity of two names, by `difflib`. Such names differ in one or two letters. HOSTNAME, which every
container has, is not similar to HOST (0.67).
"""
_ONE_LETTER = 0.96
"""The similarity of two names of 13 letters or more that differ in one letter. Such a misspelling is more likely than
that the end of a longer name is missing: MAX_CONNECTION is MAX_CONNECTIONS, and not MAX_CONNECTION_AGE_SECONDS.
"""
_SHORTEST_PART = 7
"""The fewest letters of a name that is considered the beginning of another name."""


def forget_libpq_variables() -> None:
    """Remove ``PGSERVICE``, ``PGSSLMODE`` and similar variables, which libpq adds to every address.

    This is for a database that this program has started. Its address is complete, and the variables describe other
    servers of the user.
    """
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


def end_with_the_exit_code() -> None:
    """If ``PYTHONINSPECT`` is set, start this program anew without it.

    With it, Python does not end with the exit code of `sys.exit`, but prints a traceback and ends with 1, or waits for
    input at a terminal. Python reads the variable before it runs the first line of a program, so the program cannot
    undo its effect.
    """
    if sys.flags.inspect and os.environ.pop("PYTHONINSPECT", None) is not None:
        os.execv(interpreter(), sys.orig_argv)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of the environment: the variable, its value (masked if secret), the reason and the remedy."""

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


def advice(
    text: str, *, secret: bool = False, unless: str | None = None, computed: str | None = None
) -> dict[str, Any]:
    """A field's ``json_schema_extra``: the remedy for a refused value, and whether values must stay hidden.

    ``unless``: the setting is required unless that variable is set. ``computed``: the origin of a default that is
    computed.
    """
    return {"remedy": text, "secret": secret, "unless": unless, "computed": computed}


class EnvironmentSettings(BaseModel):
    """Settings that are read once, from the environment or, if they are secret, from files. Immutable."""

    model_config = ConfigDict(extra="ignore", frozen=True, validate_default=True)

    without_counterpart: ClassVar[Mapping[str, str]] = {}
    """Variables that only other servers of this kind read → the variables of this server that replace them."""

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: object, info: ValidationInfo) -> object:
        """Apply the same rules to every text, whatever the setting: see `_number`, `_flag`, `_choice`."""
        field = cls.model_fields[str(info.field_name)]
        if not isinstance(value, str):
            return value
        if is_secret(field):
            _check_secret(value)
        elif field.annotation in (int, float):
            return _number(value, whole=field.annotation is int)
        elif field.annotation is bool:
            return _flag(value)
        elif get_origin(field.annotation) is Literal:
            return _choice(value, get_args(field.annotation))
        return value


AnySettings = TypeVar("AnySettings", bound=EnvironmentSettings)


def load_settings(
    cls: type[AnySettings],
    *,
    defaults: Mapping[str, str] | None = None,
    checks: Mapping[str, Check] | None = None,
    **overrides: str | None,
) -> AnySettings:
    """Read ``cls`` from the environment.

    Args:
        cls: The declaration of the settings.
        defaults: By variable name, for variables that the environment does not set.
        checks: By variable name: further checks of a value, which this module cannot import.
        overrides: By variable name; they take precedence over the environment. A value of None has the effect of an
            unset variable.

    Raises:
        SettingsError: holds every problem.
    """
    overridden = {
        name
        for field in cls.model_fields.values()
        if overrides.keys() & {*(names := variables(field))}
        for name in names
    }
    contents, problems = _secret_files(cls, overridden)
    unreadable = {problem.variable.removesuffix("_FILE") for problem in problems}
    values: dict[str, str | None] = {**(defaults or {})}
    for field in cls.model_fields.values():
        names = variables(field)
        for name in names:
            if name not in overridden and (given := _given(name, field)):
                values.pop(names[0], None)
                values[name] = given
                break
    values |= contents
    values |= overrides
    values = {name: value for name, value in values.items() if value is not None}
    settings = None
    try:
        settings = cls(**values)
    except ValidationError as error:
        found = [_problem(cls, dict(detail), values) for detail in error.errors()]
        problems += [problem for problem in found if problem.variable not in unreadable]
    problems += _alternatives_missing(cls, values, unreadable)
    problems += _refused_by(checks or {}, cls, values, {problem.variable for problem in problems} | unreadable)
    if problems or settings is None:
        raise SettingsError(problems) from None
    return settings


def variables(field: FieldInfo) -> tuple[str, ...]:
    """The environment variables that set ``field``, in order of precedence."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return tuple(str(choice) for choice in alias.choices)
    return (str(alias),)


def remedy(field: FieldInfo) -> str:
    """The remedy if the value of ``field`` is refused."""
    extra = field.json_schema_extra
    return str(extra["remedy"]) if isinstance(extra, dict) else ""


def is_secret(field: FieldInfo) -> bool:
    """Whether the value must never be shown, and may come from a file."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra["secret"])


def alternative(field: FieldInfo) -> str | None:
    """The variable that makes ``field`` optional if it is set; None if there is none."""
    extra = field.json_schema_extra
    return str(extra["unless"]) if isinstance(extra, dict) and extra.get("unless") else None


def default_text(field: FieldInfo) -> str:
    """The default as the reference page shows it."""
    if field.is_required():
        return "required"
    if other := alternative(field):
        return f"required unless {other} is set"
    if field.default_factory is not None:
        extra = field.json_schema_extra
        return str(extra["computed"]) if isinstance(extra, dict) else "computed"
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


def named_file(variable: str) -> str | None:
    """The file that ``<VARIABLE>_FILE`` names, from which the secret ``variable`` is read; None if there is none."""
    return os.environ.get(f"{variable}_FILE", "").strip() or None


def inherited_environment(names: tuple[str, ...], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The variables for a child process: those in ``names``, and those that start with one of ``prefixes``."""
    return {name: value for name, value in os.environ.items() if name in names or name.startswith(prefixes)}


@contextmanager
def grpc_without_lines_of_its_own() -> Iterator[None]:
    """If gRPC is imported in this context, gRPC writes no log lines of its own unless GRPC_VERBOSITY is set.

    The lines are about failed connections, which a command reports itself. gRPC reads the variable only when it is
    imported, so it is unset again afterwards, and a server that the command starts does not inherit it.
    """
    if "GRPC_VERBOSITY" in os.environ:
        yield
        return
    os.environ["GRPC_VERBOSITY"] = "NONE"
    try:
        yield
    finally:
        del os.environ["GRPC_VERBOSITY"]


def _shown(field: FieldInfo, value: object) -> str | None:
    if value is None:
        return None
    if is_secret(field):
        return "********"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else without_user_information(str(value))


def without_user_information(value: str) -> str:
    """``value`` without the user and password, if it is a URL or resembles one."""
    found = _USER_INFORMATION.match(value)
    return value if found is None else f"{found[1] or ''}********{value[found.end() - 1 :]}"


def _given(variable: str, field: FieldInfo) -> str | None:
    """The value of a variable without white space (of a secret: line ends) around it; None if nothing is left."""
    text = os.environ.get(variable, "")
    if not text.strip():
        return None
    return _without_line_ends(text) if is_secret(field) else text.strip()


def _without_line_ends(text: str) -> str:
    """A secret as it was intended, without the line end that editors and ``echo`` add, and the byte order mark of some
    editors.
    """
    return text.removeprefix(_BYTE_ORDER_MARK).strip("\r\n")


def _check_secret(text: str) -> None:
    """Refuse a secret with invisible characters, because the other side most likely has the secret without them.

    Raises:
        ValueError: the reason, without the value.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not UTF-8 text") from None
    if "\0" in text:
        raise ValueError("it holds a NUL character (is it a file in UTF-16?)")
    ends = (text[:1], text[-1:])
    if any(end.isspace() or (end and not end.isprintable()) for end in ends):
        raise ValueError("it begins or ends with white space or another invisible character, which is not dropped")


def _number(text: str, *, whole: bool) -> str:
    """``text`` if it is a decimal number, as a person would write one.

    Raises:
        ValueError: otherwise, with the likely mistake.
    """
    if (_WHOLE if whole else _DECIMAL).fullmatch(text):
        return text
    if "://" in text:
        raise ValueError(
            "it is an address, as Kubernetes sets for a Service of that name (enableServiceLinks: false ends that)"
        )
    if _DIGITS.fullmatch(text):
        raise ValueError("it has too many digits")
    if whole and _DECIMAL.fullmatch(text):
        raise ValueError("it is not a whole number")
    if _WITH_UNIT.fullmatch(text):
        raise ValueError("it has a unit; give the number alone")
    if _SEPARATED.fullmatch(text):
        raise ValueError("give the digits without separators, with a dot before decimals")
    raise ValueError("it is not a number")


def _flag(text: str) -> str:
    if text.lower() not in _FLAGS:
        raise ValueError("it is neither true nor false")
    return text.lower()


def _choice(text: str, choices: tuple[str, ...]) -> str:
    """The one of ``choices`` that differs from ``text`` only in upper and lower case; ``text`` itself if there is no
    such choice."""
    return next((choice for choice in choices if choice.lower() == text.lower()), text)


def _secret_files(cls: type[EnvironmentSettings], overridden: Container[str]) -> tuple[dict[str, str], list[Problem]]:
    """The secrets, by variable, from the files that ``<VARIABLE>_FILE`` names; and the problems of files that cannot be
    used.
    """
    contents: dict[str, str] = {}
    problems: list[Problem] = []
    for field in cls.model_fields.values():
        variable = variables(field)[0]
        path = named_file(variable)
        if path is None or not is_secret(field) or variable in overridden:
            continue
        if _given(variable, field):
            reason = f"{variable} is set as well"
            action = f"Set only one of {variable} and {variable}_FILE; an empty one counts as unset, so where a base "
            action += f"sets {variable}_FILE, override it with {variable}_FILE="
        else:
            try:
                contents[variable] = _read_secret(path)
                continue
            except _UnusableFile as unusable:
                reason, action = unusable.args
        problems.append(Problem(f"{variable}_FILE", _shown_path(path), reason, action))
    return contents, problems


def _shown_path(path: str) -> str:
    """``path``, unless it may be the secret itself in place of a path."""
    return path if path.startswith(("/", "./", "../")) or os.path.lexists(path) else "********"


class _UnusableFile(Exception):
    """The reason why the file cannot be used, and the remedy."""


def _read_secret(path: str) -> str:
    try:
        # The file is opened without blocking, because opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _UnusableFile("it is not a regular file", "Name a file, which can be read again on SIGHUP")
            octets = file.read(_LARGEST_SECRET_FILE + 1)
        text = octets.decode()
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise _UnusableFile("its content is not UTF-8 text", "Write the secret as text") from None
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _UnusableFile(
            f"it cannot be read ({why})", "Name a file that the server may read; the secret itself is not a name"
        ) from None
    if len(octets) > _LARGEST_SECRET_FILE:
        raise _UnusableFile("it has more than 1 MiB", "Name the file that holds the secret alone")
    if not text.removeprefix(_BYTE_ORDER_MARK).strip():
        raise _UnusableFile("the file is empty", "Write the secret into it")
    return _without_line_ends(text)


def _alternatives_missing(
    cls: type[EnvironmentSettings], values: Mapping[str, str | None], unreadable: Container[str]
) -> list[Problem]:
    """The problems of required settings that are not set and whose alternative is not set either."""
    return [
        Problem(variable, None, "it is required", remedy(field))
        for field in cls.model_fields.values()
        for variable, other in [(variables(field)[0], alternative(field))]
        if other is not None
        and not (values.get(variable) or values.get(other) or variable in unreadable or other in unreadable)
    ]


def _refused_by(
    checks: Mapping[str, Check], cls: type[EnvironmentSettings], values: Mapping[str, str | None], known: Container[str]
) -> list[Problem]:
    by_variable = {variables(field)[0]: field for field in cls.model_fields.values()}
    found = []
    for variable, check in checks.items():
        value, field = values.get(variable), by_variable[variable]
        if value and variable not in known and (reason := check(value)) is not None:
            found.append(Problem(variable, _shown(field, value), reason, remedy(field)))
    return found


@dataclass(frozen=True, slots=True)
class Notice:
    """A part of the environment that is probably a mistake, but does not prevent a start."""

    variable: str
    text: str


def notices(cls: type[EnvironmentSettings]) -> list[Notice]:
    """Warnings about the environment for the operator, without secrets."""
    known = {name: field for field in cls.model_fields.values() for name in variables(field)}
    found = [
        Notice(name, "line ends, or a byte order mark, around the value were dropped")
        for name, field in known.items()
        if is_secret(field) and (given := _given(name, field)) and given != os.environ[name]
    ]
    names = {*known, *(f"{variables(field)[0]}_FILE" for field in cls.model_fields.values() if is_secret(field))}
    found += [Notice(name, text) for name, text in cls.without_counterpart.items() if os.environ.get(name)]
    for name in sorted(os.environ.keys() - names - cls.without_counterpart.keys()):
        meant = _meant(name, names)
        if meant is not None and not os.environ.get(meant):
            found.append(Notice(name, f"the server does not read it; did you mean {meant}?"))
    return found


def _meant(name: str, names: set[str]) -> str | None:
    """The one of ``names`` for which ``name`` is probably a misspelling."""
    # Variables that libpq, the client commands or OpenTelemetry's SDK read, and those that Kubernetes sets for every
    # Service.
    if name.startswith(("PG", "DEFINITION_SERVER_", "OTEL_")) or "://" in os.environ.get(name, ""):
        return None
    upper = name.upper().replace("-", "_")
    if upper in names:
        return upper
    for prefix in ("AVAP_", "DEFINITION_"):
        if upper.removeprefix(prefix) in names and upper != upper.removeprefix(prefix):
            return upper.removeprefix(prefix)
    if nearest := difflib.get_close_matches(upper, sorted(names), n=1, cutoff=_ONE_LETTER):
        return nearest[0]
    if len(upper) >= _SHORTEST_PART:
        longer = [known for known in sorted(names) if known.startswith(f"{upper}_") and not known.endswith("_FILE")]
        longer += [known for known in sorted(names) if known.startswith(f"{upper}_") and known.endswith("_FILE")]
        if longer:
            return longer[0]
    close = difflib.get_close_matches(upper, sorted(names), n=1, cutoff=_SIMILARITY)
    return close[0] if close else None


def _problem(cls: type[EnvironmentSettings], detail: dict[str, Any], values: Mapping[str, str | None]) -> Problem:
    location = str(detail["loc"][0])
    field = next(f for name, f in cls.model_fields.items() if location in (name, *variables(f)))
    variable = next((v for v in variables(field) if values.get(v)), variables(field)[0])
    value = None if detail["type"] == "missing" else _shown(field, detail.get("input"))
    reason = "it is required" if detail["type"] == "missing" else _lower_first(str(detail["msg"]))
    return Problem(variable, value, reason, remedy(field))


def _lower_first(message: str) -> str:
    text = message.removeprefix("Value error, ").replace("Input should", "it should")
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]  # a variable's name keeps its capitals
