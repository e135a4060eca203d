"""Logs: one JSON object per line on stdout in production, readable text in development.

Fields: ``ts`` (ISO 8601, UTC), ``level`` (DEBUG INFO WARN ERROR FATAL), ``msg``, ``pid``, then those of the event. In
production an exception is logged as ``error`` (type and text) and ``at`` (file and line), never as a traceback.
Records of libraries that use the standard ``logging`` have the same format.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import MutableMapping
from typing import Any

import structlog

_LEVELS = {"warning": "WARN", "critical": "FATAL", "exception": "ERROR"}
_STANDARD = {"DEBUG": 10, "INFO": 20, "WARN": 30, "ERROR": 40, "FATAL": 50}

EventDict = MutableMapping[str, Any]


def configure_logs(app_env: str, level: str) -> None:
    """Set up logging for this process. ``level`` is one of DEBUG, INFO, WARN, ERROR, FATAL."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        _add_pid,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    render: list[Any]
    if app_env == "production":
        render = [_exception_fields, _field_names, structlog.processors.JSONRenderer(_to_json)]
    else:
        # The plain traceback: the rich one shows local variables, which may be keys.
        render = [
            structlog.dev.ConsoleRenderer(
                timestamp_key="ts",
                colors=sys.stdout.isatty(),
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_STANDARD[level])
    # A failure while logging (the reader of stdout is gone) must not print a traceback on stderr.
    logging.raiseExceptions = app_env != "production"
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(_STANDARD[level]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of one module: ``log.info("Message", field=value)``."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(name)
    return logger


def _add_pid(_: Any, __: str, event: EventDict) -> EventDict:
    event["pid"] = os.getpid()
    return event


def _exception_fields(_: Any, __: str, event: EventDict) -> EventDict:
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        event["error"] = f"{type(error).__name__}: {error}"
        frames = traceback.extract_tb(error.__traceback__)
        if frames:
            event["at"] = f"{frames[-1].filename}:{frames[-1].lineno}"
    event.pop("stack_info", None)
    return event


def _field_names(_: Any, __: str, event: EventDict) -> EventDict:
    level = str(event.pop("level", "info"))
    fields = {
        "ts": event.pop("ts"),
        "level": _LEVELS.get(level, level.upper()),
        "msg": event.pop("event"),
        "pid": event.pop("pid"),
    }
    return {**event, **fields} if fields.keys() & event.keys() else {**fields, **event}


def _to_json(event: EventDict, **_: Any) -> str:
    """``event`` as JSON. Values that have no JSON form are written as text, so that no line is lost."""
    try:
        return json.dumps(event, default=str, allow_nan=False)
    except Exception:  # noqa: BLE001 - whatever a value's own methods raise
        return json.dumps(
            {_safe(key): value if isinstance(value, str | int) else _safe(value) for key, value in event.items()}
        )


def _safe(value: object) -> str:
    try:
        return value if isinstance(value, str) else repr(value)
    except Exception:  # noqa: BLE001 - the same
        return f"<{type(value).__name__} that cannot be shown>"
