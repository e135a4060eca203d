"""Spans are nested and bounded, and cost nothing if they are not recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from definition_server.observability import tracing
from definition_server.observability.tracing import Recorder, begin, record_to, span


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder(most=3)
    record_to(recorder)
    yield recorder
    record_to(None)


def test_without_a_recorder_a_step_is_one_object_that_does_nothing() -> None:
    with span("outer", a=1) as outer:
        outer.set(b=2)
        outer.event("e", c=3)
        outer.fail("why")
    outer.end()
    assert outer is begin("other")


def test_a_step_within_a_step_is_its_child_also_after_an_await(recorder: Recorder) -> None:
    async def work() -> None:
        with span("outer"):
            await asyncio.sleep(0)
            with span("inner", rows=2) as inner:
                inner.set(left_out=None, held=1)
                inner.event("happened", name="x")
        with span("next"):
            pass

    asyncio.run(work())
    inner, outer, after = recorder.take()
    assert (inner.name, inner.parent_id, inner.trace_id) == ("inner", outer.span_id, outer.trace_id)
    assert (outer.parent_id, after.parent_id) == (None, None)
    assert after.trace_id != outer.trace_id
    assert inner.attributes == {"rows": 2, "held": 1}
    assert [(event.name, event.attributes) for event in inner.events] == [("happened", {"name": "x"})]
    assert outer.start_ns <= inner.start_ns
    assert inner.end_ns >= inner.start_ns > 0


def test_an_exception_ends_a_step_with_its_type_and_not_its_text(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match="secret"), span("step"):
        raise ValueError("a secret")
    (ended,) = recorder.take()
    assert ended.failure == "ValueError"
    assert "secret" not in repr(ended)


def test_a_reason_takes_precedence_over_the_type_of_an_exception(recorder: Recorder) -> None:
    def work() -> None:
        with span("step") as step:
            step.fail("table_missing")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        work()
    assert recorder.take()[0].failure == "table_missing"


def test_a_step_that_outlives_its_parent_is_recorded_once(recorder: Recorder) -> None:
    with span("publish"):
        late = begin("hand over", generation=1)
    assert [each.name for each in recorder.take()] == ["publish"]
    late.end()
    first = late.span.end_ns
    late.end()
    (recorded,) = recorder.take()
    assert (recorded.name, recorded.end_ns) == ("hand over", first)


def test_the_oldest_spans_are_dropped_and_counted_if_no_exporter_takes_them(recorder: Recorder) -> None:
    for number in range(5):
        with span(str(number)):
            pass
    assert [each.name for each in recorder.take()] == ["2", "3", "4"]
    assert recorder.dropped == 2
    assert recorder.take() == []


def test_the_queue_of_spans_holds_a_whole_cycle() -> None:
    assert tracing.MOST_WAITING > 100 * 9
