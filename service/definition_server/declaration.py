"""Declares settings as the fields of a class: types, bounds and checks, read from texts.

The forms are those of pydantic, without its cost: its import alone takes a quarter of a server's start and 10 MB of the
master's memory, for forty texts that are read once (docs/decisions/0027). Every rule that matters to an operator is in
`environment` and in the checks of the fields.

A field has one of these types: ``str``, ``int``, ``float``, ``bool``, ``Path``, `SecretStr`, ``Literal`` of texts, or
one of them or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

_TRUE = ("true", "1", "yes", "on", "t", "y")
_MISSING: Any = object()


class SecretStr:
    """A text that is not shown by accident."""

    __slots__ = ("_secret",)

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def get_secret_value(self) -> str:
        """The text."""
        return self._secret

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretStr) and other._secret == self._secret

    def __hash__(self) -> int:
        return hash(self._secret)

    def __str__(self) -> str:
        return "**********"

    def __repr__(self) -> str:
        return "SecretStr('**********')"


class FieldInfo(NamedTuple):
    """The declaration of one field. A bound of None does not bound."""

    default: Any
    default_factory: Callable[[], Any] | None
    validation_alias: tuple[str, ...]
    """The variables that set it, in order of precedence."""
    description: str
    json_schema_extra: Mapping[str, Any]
    """See `environment.advice`."""
    ge: float | None
    gt: float | None
    le: float | None
    annotation: Any = None
    """Its type, without the bounds of an ``Annotated``."""

    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is _MISSING and self.default_factory is None


class Bounds(NamedTuple):
    """For an ``Annotated`` number: at least ``ge``, more than ``gt``, at most ``le``."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None


def Field(  # noqa: N802 - pydantic's name
    default: Any = _MISSING,
    *,
    validation_alias: str | tuple[str, ...],
    description: str,
    json_schema_extra: Mapping[str, Any],
    default_factory: Callable[[], Any] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """Declares a field of a `Declaration`."""
    aliases = (validation_alias,) if isinstance(validation_alias, str) else validation_alias
    return FieldInfo(default, default_factory, aliases, description, json_schema_extra, ge, gt, le)


class Fault(NamedTuple):
    """Why a value is refused."""

    field: str
    reason: str
    value: Any = None
    missing: bool = False


class Refused(Exception):
    """``faults`` holds every one."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.field}: {fault.reason}" for fault in faults))
        self.faults = faults


class ValidationInfo(NamedTuple):
    """What a check may know beside the value."""

    field_name: str
    data: Mapping[str, Any]
    """The fields before it that are valid."""


class _Check(NamedTuple):
    fields: tuple[str, ...]
    function: Any
    knows_more: bool


def field_validator(*fields: str) -> Callable[[Any], Any]:
    """A class method ``(value)`` or ``(value, info)`` that returns the value, or raises ValueError with the reason."""

    def declare(method: Any) -> Any:
        return _Check(fields, method.__func__, method.__func__.__code__.co_argcount > 2)

    return declare


class Declaration:
    """The base of classes whose attributes are made by `Field`. Objects are made from texts, and are immutable."""

    model_fields: Mapping[str, FieldInfo] = {}
    _checks: Mapping[str, tuple[_Check, ...]] = {}

    def __init_subclass__(cls) -> None:
        declared = {name: value for name, value in vars(cls).items() if isinstance(value, FieldInfo)}
        if declared:
            types = get_type_hints(cls, include_extras=True)
            cls.model_fields = {name: _of_type(field, types[name]) for name, field in declared.items()}
        found = [value for value in vars(cls).values() if isinstance(value, _Check)]
        cls._checks = {name: tuple(check for check in found if name in check.fields) for name in cls.model_fields}

    def __init__(self, **texts: object) -> None:
        """``texts``: by variable; None is as unset. Names that are not declared are ignored.

        Raises:
            Refused: where values are missing or not valid.
        """
        data: dict[str, Any] = {}
        faults: list[Fault] = []
        for name, field in self.model_fields.items():
            text = next((texts[alias] for alias in field.validation_alias if texts.get(alias) is not None), None)
            if text is None and field.is_required():
                faults.append(Fault(name, "it is required", missing=True))
                continue
            if text is None:
                text = field.default if field.default_factory is None else field.default_factory()
            try:
                data[name] = self._valid(name, field, text, data)
            except ValueError as error:
                faults.append(Fault(name, str(error), text))
        if faults:
            raise Refused(faults)
        self.__dict__.update(data)

    @classmethod
    def _read(cls, field: FieldInfo, text: str) -> str:
        """``text`` in the form that `_converted` takes, for subclasses with rules of their own.

        Raises:
            ValueError: the reason where it is refused.
        """
        return text

    @classmethod
    def _valid(cls, name: str, field: FieldInfo, value: Any, data: Mapping[str, Any]) -> Any:
        """The valid value for ``value``, which is a text or the default.

        Raises:
            ValueError: the reason where it is refused.
        """
        if isinstance(value, str):
            value = _converted(field.annotation, cls._read(field, value))
            _check_bounds(field, value)
        for check in cls._checks[name]:
            more = (ValidationInfo(name, data),) if check.knows_more else ()
            value = check.function(cls, value, *more)
        return value

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """Like this, with other values, which are not judged."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__ | dict(update))
        return copy

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


def _of_type(field: FieldInfo, annotation: Any) -> FieldInfo:
    """``field`` with its type, and with the bounds that the type carries."""
    if get_origin(annotation) is not Annotated:
        return field._replace(annotation=annotation)
    plain, bounds = get_args(annotation)
    return field._replace(annotation=plain, ge=bounds.ge, gt=bounds.gt, le=bounds.le)


def _converted(annotation: Any, text: str) -> Any:
    """``text`` as a value of the type ``annotation``; of the types in a union, the first that it fits.

    Raises:
        ValueError: the reason where it fits none.
    """
    if get_origin(annotation) is Literal and text not in get_args(annotation):
        *others, last = map(repr, get_args(annotation))
        raise ValueError(f"it should be {', '.join(others)} or {last}")
    for kind in (annotation,) if isinstance(annotation, type) else get_args(annotation) or (annotation,):
        if get_origin(kind) is Literal and text in get_args(kind):
            return text
        if kind is bool:
            return text in _TRUE
        if kind in (int, float, SecretStr, Path):
            return kind(text)
    return text


def _check_bounds(field: FieldInfo, value: Any) -> None:
    """Raises ValueError where ``value`` is a number outside of the bounds."""
    if isinstance(value, float) and not isfinite(value):
        raise ValueError("it should be a finite number")
    if field.ge is not None and value < field.ge:
        raise ValueError(f"it should be greater than or equal to {field.ge}")
    if field.gt is not None and value <= field.gt:
        raise ValueError(f"it should be greater than {field.gt}")
    if field.le is not None and value > field.le:
        raise ValueError(f"it should be less than or equal to {field.le}")
