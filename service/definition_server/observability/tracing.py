"""Spans: the steps of the control plane, recorded for the optional export to OpenTelemetry (`control_plane.telemetry`).

A part of the server marks a step with `span`, just as it logs with `get_logger`, whether spans are recorded or not.
Without a recorder (`record_to`) a step costs one comparison, and OpenTelemetry is not imported. With one, finished
spans wait in a bounded queue; if no reader takes them, the oldest are dropped and counted. Attributes are numbers,
names and reasons from a fixed list, as on the status page, and never the text of an error or a secret.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import getrandbits
from types import TracebackType

Value = str | bool | int | float

MOST_WAITING = 4096
"""The most finished spans that wait to be taken. A cycle has at most nine spans."""


@dataclass(frozen=True, slots=True)
class Event:
    """An event within a span."""

    name: str
    at_ns: int
    attributes: dict[str, Value]


@dataclass(slots=True)
class Span:
    """A finished step. Times are nanoseconds since the epoch."""

    name: str
    trace_id: int
    span_id: int
    parent_id: int | None
    start_ns: int
    end_ns: int = 0
    attributes: dict[str, Value] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    failure: str | None = None
    """The type of the exception that ended the step, or a reason."""
    of_a_call: bool = False
    """Whether the span is a client's call, and not a step of the server."""


def new_trace(name: str, start_ns: int, end_ns: int) -> Span:
    """A finished span without a parent."""
    return Span(name, getrandbits(128), getrandbits(64), None, start_ns, end_ns)


class Recorder:
    """Keeps finished spans until they are taken; another thread may take them."""

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._finished: deque[Span] = deque()
        self._most = most
        self.dropped = 0
        """Number of finished spans that were dropped before they were taken."""

    def put(self, finished: Span) -> None:
        """Keep ``finished``. If the queue is full, the oldest span is dropped."""
        if len(self._finished) >= self._most:
            self._finished.popleft()
            self.dropped += 1
        self._finished.append(finished)

    def take(self) -> list[Span]:
        """The spans that were finished since the last call."""
        taken = []
        while self._finished:
            taken.append(self._finished.popleft())
        return taken


class Step:
    """A step that has not ended, for use by the code of the step."""

    def __init__(self, recorder: Recorder, name: str, attributes: dict[str, Value]) -> None:
        parent = _current.get()
        self._recorder = recorder
        self._began = time.perf_counter_ns()
        self.span = Span(
            name,
            getrandbits(128) if parent is None else parent.trace_id,
            getrandbits(64),
            None if parent is None else parent.span_id,
            time.time_ns(),
            attributes=attributes,
        )

    def set(self, **attributes: Value | None) -> None:
        """Add attributes; None adds nothing."""
        self.span.attributes |= {name: value for name, value in attributes.items() if value is not None}

    def event(self, name: str, /, **attributes: Value) -> None:
        """Note an event."""
        self.span.events.append(Event(name, time.time_ns(), attributes))

    def fail(self, reason: str) -> None:
        """Note that the step has failed, for ``reason``, although no exception leaves it."""
        self.span.failure = reason

    def end(self) -> None:
        """End the step. Only the first call has an effect."""
        if not self.span.end_ns:
            self.span.end_ns = self.span.start_ns + time.perf_counter_ns() - self._began
            self._recorder.put(self.span)


class _NoStep(Step):
    """The span that code gets if nothing is recorded."""

    def __init__(self) -> None:
        pass

    def set(self, **attributes: Value | None) -> None:
        """No effect."""

    def event(self, name: str, /, **attributes: Value) -> None:
        """No effect."""

    def fail(self, reason: str) -> None:
        """No effect."""

    def end(self) -> None:
        """No effect."""

    def __enter__(self) -> Step:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


_NOTHING = _NoStep()
_current: ContextVar[Span | None] = ContextVar("span", default=None)
_recorders: list[Recorder] = []
"""The recorder of this process, if there is one."""


def record_to(recorder: Recorder | None) -> None:
    """From now on, record spans in ``recorder``; None: record none."""
    _recorders[:] = [] if recorder is None else [recorder]


def begin(name: str, /, **attributes: Value) -> Step:
    """Begin a child step of the present step. It may outlive its parent; `Step.end` ends it."""
    return Step(_recorders[0], name, attributes) if _recorders else _NOTHING


def span(name: str, /, **attributes: Value) -> AbstractContextManager[Step]:
    """A context that is the step ``name``, a child of the present step."""
    return _recorded(_recorders[0], name, attributes) if _recorders else _NOTHING


@contextmanager
def _recorded(recorder: Recorder, name: str, attributes: dict[str, Value]) -> Iterator[Step]:
    step = Step(recorder, name, attributes)
    token = _current.set(step.span)
    try:
        yield step
    except BaseException as error:
        step.span.failure = step.span.failure or type(error).__name__
        raise
    finally:
        _current.reset(token)
        step.end()
