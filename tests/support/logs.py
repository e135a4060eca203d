"""The log lines of a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.testing import capture_logs

LogLines = list[Any]


@contextmanager
def captured_logs() -> Iterator[LogLines]:
    """The log lines of the block at all levels, with any earlier configuration of logging."""
    before = structlog.get_config()
    structlog.reset_defaults()
    try:
        with capture_logs() as lines:
            yield lines
    finally:
        structlog.configure(**before)


def logged(lines: LogLines, message: str, **fields: object) -> LogLines:
    """The lines with that message and those fields; the level is the field ``log_level``, as in structlog."""
    return [
        line
        for line in lines
        if line["event"] == message and all(line.get(key) == value for key, value in fields.items())
    ]
