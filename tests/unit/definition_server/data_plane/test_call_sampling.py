"""Sampling of calls: every call is counted, one in each interval is noted, and a report is small enough to be sent."""

from __future__ import annotations

import pytest

from definition_server.data_plane.call_sampling import MOST_NOTED, CallSampling
from definition_server.data_plane.worker import _sampling
from definition_server.ipc.channel import _MAX_FROM_WORKER
from definition_server.ipc.messages import FROM_WORKER, CallsSampled, Configure, decode, encode
from definition_server.ipc.stats import STATUSES, unshared_slot

LARGEST = 2**55


def configuration(one_call_in: int) -> Configure:
    return Configure("::", 0, "native", False, 0.0, 1, "production", "INFO", 1.0, trace_one_call_in=one_call_in)


def test_without_sampling_a_worker_counts_directly_on_its_page() -> None:
    slot = unshared_slot()
    assert _sampling(slot, configuration(0)) is None
    assert isinstance(_sampling(slot, configuration(5)), CallSampling)


def test_every_call_is_counted_and_one_in_each_interval_is_noted() -> None:
    slot = unshared_slot()
    sampling = CallSampling(slot, 10)
    assert sampling.take() is None
    for _ in range(25):
        sampling.count(0, STATUSES.index("404"), 1500)
    report = sampling.take()
    assert report is not None
    assert (report.methods, report.statuses, report.elapsed_ns) == ((0, 0), (3, 3), (1500, 1500))
    assert report.plausible
    assert slot.read().requests["404"] == 25
    assert sampling.take() is None


def test_the_tenth_call_of_ten_is_noted_and_not_an_earlier_one() -> None:
    sampling = CallSampling(unshared_slot(), 10)
    for _ in range(2):
        sampling.count_many(0, 0, 8, 1)
        sampling.count(0, 0, 2)
        assert sampling.take() is None
        sampling.count(0, 0, 3)
        report = sampling.take()
        assert report is not None
        assert report.elapsed_ns == (3,)


def test_a_batch_larger_than_the_sampling_interval_is_noted_once() -> None:
    sampling = CallSampling(unshared_slot(), 10)
    sampling.count_many(1, 0, 64, 100)
    report = sampling.take()
    assert report is not None
    assert report.methods == (1,)


def test_a_full_report_fits_into_a_datagram() -> None:
    sampling = CallSampling(unshared_slot(), 1)
    for _ in range(3 * MOST_NOTED):
        sampling.count(1, 5, LARGEST)
    report = sampling.take()
    assert report is not None
    assert len(report.methods) == MOST_NOTED
    assert len(encode(report)) <= _MAX_FROM_WORKER
    assert decode(encode(report), FROM_WORKER) == report


@pytest.mark.parametrize(
    "report",
    [
        CallsSampled((2,), (0,), (1,), (1,)),
        CallsSampled((0,), (6,), (1,), (1,)),
        CallsSampled((0, 1), (0,), (1,), (1,)),
        CallsSampled((0,), (0,), (1,), (2,)),
    ],
    ids=["method", "status", "lengths", "longer-than-time"],
)
def test_impossible_reports_of_calls_are_not_plausible(report: CallsSampled) -> None:
    assert not report.plausible
