"""docs/observability.md lists every fixed log message and every field of /statusz, and no others.

Both lists are read from the source, so a failure names the missing entries of the page.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from definition_server.observability.reasons import Reason
from definition_server.observability.status import ServiceStatus

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service"
PAGE = ROOT / "docs/observability.md"

LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
LOGGERS = {"log", "_log", "logger"}


def fixed(node: ast.expr) -> list[str] | None:
    """The texts that an expression can be, or None if one of them is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        either, other = fixed(node.body), fixed(node.orelse)
        return None if either is None or other is None else either + other
    return None


def message_of(call: ast.Call) -> ast.expr | None:
    """The message argument of a log call, or None if the call does not log.

    Two forms are known: ``log.error("Message", …)``, and any call with a level of `logging` followed by the message,
    such as ``limited.log(now, logging.INFO, "Message", …)``.
    """
    for level, message in zip(call.args, call.args[1:], strict=False):
        if isinstance(level, ast.Attribute) and isinstance(level.value, ast.Name) and level.value.id == "logging":
            return message
    function = call.func
    if isinstance(function, ast.Attribute):
        owner = function.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        if name in LOGGERS and function.attr in LEVELS and call.args:
            return call.args[0]
        if name in LOGGERS and function.attr == "log" and len(call.args) > 1:
            return call.args[1]
    return None


def logged(text: str) -> Iterator[tuple[int, str | None]]:
    """Line and message of each log call in a source text; None for a message that is not fixed."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and (message := message_of(node)) is not None:
            texts = fixed(message)
            if texts is None and isinstance(message, ast.Name) and message.id == "message":
                continue  # RateLimitedLog, which logs the message of its caller
            yield from ((node.lineno, each) for each in texts or [None])


def messages() -> dict[str, str]:
    """Every fixed message of the service → where it is logged."""
    return {
        message: f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(SERVICE.rglob("*.py"))
        for line, message in logged(path.read_text(encoding="utf-8"))
        if message is not None
    }


def between(name: str) -> str:
    (found,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def first_column(name: str) -> list[str]:
    """Everything in code marks in the first column of the tables of a marked part of the page."""
    rows = re.findall(r"^\| (`.+?) \|", between(name), re.MULTILINE)
    return [each for row in rows for each in re.findall(r"`([^`]+)`", row)]


def covers(entry: str, message: str) -> bool:
    """Whether an entry is a message, or its beginning and an ellipsis."""
    return message.startswith(entry[:-1]) if entry.endswith("…") else message == entry


def test_every_log_message_is_a_fixed_text() -> None:
    computed = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(SERVICE.rglob("*.py"))
        for line, message in logged(path.read_text(encoding="utf-8"))
        if message is None
    ]
    assert computed == []


def test_the_page_lists_every_log_message_once() -> None:
    entries = first_column("log messages")
    assert len(entries) == len(set(entries))
    missing = {
        message: place for message, place in messages().items() if not any(covers(each, message) for each in entries)
    }
    assert missing == {}


def test_the_page_lists_no_log_message_that_the_source_does_not_have() -> None:
    known = messages()
    assert [each for each in first_column("log messages") if not any(covers(each, message) for message in known)] == []


def fields(kind: object, prefix: str = "") -> Iterator[str]:
    """Paths of the fields of a status class, as the page writes them: ``sync.cycles``, ``workers[].pid``."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            path = f"{prefix}.{field.name}" if prefix else field.name
            inner = list(fields(hints[field.name], path))
            yield from inner or [path]
            if inner and not any(each.startswith(f"{path}[]") for each in inner):
                yield path  # an object that may be null has its own row
        return
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        yield from fields(arguments[0], f"{prefix}[]")
    elif isinstance(kind, types.UnionType):
        for each in arguments:
            yield from fields(each, prefix)


def test_the_page_lists_exactly_the_fields_of_statusz() -> None:
    listed = first_column("statusz")
    assert len(listed) == len(set(listed))
    known = set(fields(ServiceStatus))
    objects = {path for path in known if any(other.startswith(f"{path}.") for other in known)}
    assert known - objects <= set(listed)
    assert set(listed) <= known


def test_the_page_lists_exactly_the_reasons() -> None:
    listed = first_column("reasons")
    assert sorted(listed) == sorted(Reason)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('log.error("One", error=1)', ["One"]),
        ('self._log.info("One" if better else "Two")', ["One", "Two"]),
        ('limited.log(now, logging.INFO, "One", peer)', ["One"]),
        ('tell(now, logging.WARNING, "One", peer, error=2)', ["One"]),
        ('log.error(f"One {two}")', [None]),
        ('log.error("One %s" % two)', [None]),
        ("self._log.log(level, message, extra={})", []),
        ('print("One")', []),
    ],
)
def test_messages_are_read_from_log_calls(text: str, found: list[str | None]) -> None:
    assert [message for _, message in logged(text)] == found
