"""Logs: one JSON object per line on stdout in production, readable text in development.

Fields: ``ts`` (ISO 8601, UTC), ``level`` (DEBUG INFO WARN ERROR FATAL), ``msg``, ``pid``, then those of the event. In
production an exception is logged as ``error`` (type and text) and ``at`` (file and line), never as a traceback.
Records of libraries that use the standard ``logging`` have the same format. A thread writes the lines
(`line_writer.py`): logging never waits for stdout.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, TextIO

import structlog

from definition_server.observability.line_writer import LineWriter

_LEVELS = {"warning": "WARN", "critical": "FATAL", "exception": "ERROR"}
_STANDARD = {"DEBUG": 10, "INFO": 20, "WARN": 30, "ERROR": 40, "FATAL": 50}

FLUSH_SECONDS = 1.0
"""Seconds for which the end of the process waits until stdout has taken the last lines; the logging of a FATAL line
waits for the same time."""

EventDict = MutableMapping[str, Any]

_writers: dict[int, LineWriter] = {}
"""Descriptor → its writer. A process has one writer. If logging is set up again, it continues to use this writer, so
lines stay in order.
"""


def configure_logs(app_env: str, level: str, *, hold: bool = False) -> None:
    """Set up logging for this process.

    Args:
        app_env: ``production``: JSON. Anything else: readable text.
        level: One of DEBUG, INFO, WARN, ERROR, FATAL.
        hold: Write nothing, and start no thread, until `release_logs`, `flush_logs` or the end of the process.
    """
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        *([_add_pid] if app_env == "production" else []),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    render: list[Any]
    if app_env == "production":
        render = [_exception_fields, _field_names, structlog.processors.JSONRenderer(_to_json)]
    else:
        # The plain traceback, because the rich one shows local variables, which may be keys.
        render = [
            _visible,
            _brief,
            structlog.dev.ConsoleRenderer(
                timestamp_key="ts",
                colors=sys.stdout.isatty(),
                exception_formatter=_plain_traceback,
            ),
        ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )
    handler = _handler(sys.stdout, formatter, hold)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_STANDARD[level])
    if app_env == "production":
        _log_what_python_would_print()
    # A failure while logging (the reader of stdout is gone) must not print a traceback on stderr.
    logging.raiseExceptions = app_env != "production"
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(_STANDARD[level]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def log_warnings_to_stderr() -> None:
    """For a command that prints its result on stdout: log only warnings and errors, as readable lines on stderr."""
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            _visible,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_STANDARD["WARN"]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _log_what_python_would_print() -> None:
    """Log the texts that Python would write to stderr: uncaught exceptions and warnings.

    stderr is usually the same pipe as stdout, so such a write could block a thread, or an event loop, for ever. (The
    output of a crash in native code, and of `faulthandler`, is still written to stderr.)
    """
    log = get_logger("definition_server")

    def on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            log.critical("Unhandled exception; the process ends", exc_info=error)

    def on_exception_in_thread(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
            name = "" if failure.thread is None else failure.thread.name
            log.error("Unhandled exception in a thread", thread=name, exc_info=failure.exc_value)

    def on_unraisable(failure: sys.UnraisableHookArgs) -> None:
        log.error("Exception that could not be raised", place=repr(failure.object), exc_info=failure.exc_value)

    sys.excepthook, threading.excepthook, sys.unraisablehook = on_exception, on_exception_in_thread, on_unraisable
    logging.captureWarnings(True)


def release_logs() -> None:
    """Write the lines that were held back, and from now on each line at once."""
    for writer in _writers.values():
        writer.release()


def flush_logs(seconds: float = FLUSH_SECONDS) -> None:
    """Wait until the lines so far are written, at most for ``seconds``. To be called before `os._exit`."""
    for writer in _writers.values():
        writer.flush(seconds)


def dropped_lines() -> int:
    """Number of lines that this process logged and that were dropped."""
    return sum(writer.dropped for writer in _writers.values())


def waiting_lines() -> int:
    """Number of lines that this process logged and that stdout has not taken yet."""
    return sum(writer.waiting for writer in _writers.values())


class _LineHandler(logging.Handler):
    """Hands lines to a `LineWriter`."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Log ``record``. This waits only after a FATAL line, which a process writes before it ends, and for a limited
        time."""
        try:
            line = self.format(record) + "\n"
            self._writer.put(line.encode(errors="backslashreplace"))
        except Exception:  # noqa: BLE001 - as `logging.StreamHandler` does
            self.handleError(record)
        if record.levelno >= logging.CRITICAL:
            self._writer.flush(FLUSH_SECONDS)


def _handler(stream: TextIO | None, formatter: logging.Formatter, hold: bool) -> logging.Handler:
    """The handler that writes to ``stream``. If the stream has a descriptor, a thread writes."""
    if stream is None:  # the process was started with stdout closed
        return logging.NullHandler()
    handler: logging.Handler
    try:
        descriptor = stream.fileno()
    except OSError:
        handler = logging.StreamHandler(stream)
    else:
        writer = _writers.setdefault(descriptor, LineWriter(descriptor, hold=hold))
        writer.use_gap(lambda missing: _gap(formatter, logging.WARNING, "Log lines are missing here", missing))
        handler = _LineHandler(writer)
    handler.setFormatter(formatter)
    return handler


def _gap(formatter: logging.Formatter, level: int, message: str, missing: int) -> bytes:
    record = logging.LogRecord("definition_server", level, __file__, 0, message, None, None)
    record.dropped = missing
    return (formatter.format(record) + "\n").encode(errors="backslashreplace")


def _begin_again() -> None:
    for writer in _writers.values():
        writer.begin_again()


os.register_at_fork(after_in_child=_begin_again)
atexit.register(flush_logs)


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


def _visible(_: Any, __: str, event: EventDict) -> EventDict:
    """Escapes control characters of the message, which may be a library's. The renderer escapes the control characters
    of the fields."""
    event["event"] = _escaped(str(event["event"]))
    return event


def _brief(_: Any, __: str, event: EventDict) -> EventDict:
    """Shortens a line for a human reader: time without date, only the first digits of hashes, no empty counts."""
    event["ts"] = str(event["ts"])[11:23]
    for name in _OFTEN_ZERO:
        if event.get(name) == 0:
            del event[name]
    for name, value in event.items():
        if isinstance(value, str) and _HASH.fullmatch(value):
            event[name] = value[:12]
    return event


_OFTEN_ZERO = ("added", "changed", "removed")
_HASH = re.compile("[0-9a-f]{64}")


def _escaped(text: str) -> str:
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def _plain_traceback(out: TextIO, exc_info: Any) -> None:
    """The traceback, without colours and without the control characters of the exception's text."""
    written = io.StringIO()
    structlog.dev.plain_traceback(written, exc_info)
    out.write(_escaped(written.getvalue()))


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
