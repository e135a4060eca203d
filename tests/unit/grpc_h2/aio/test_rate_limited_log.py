"""The log of clients' faults: a limited rate, and a count of the lines that are left out."""

from __future__ import annotations

import logging

import pytest

from grpc_h2.aio.rate_limited_log import BURST, PER_SECOND, RateLimitedLog

LOG = logging.getLogger("grpc_h2")


@pytest.fixture
def client_log(caplog: pytest.LogCaptureFixture) -> RateLimitedLog:
    caplog.set_level(logging.INFO, LOG.name)
    return RateLimitedLog(LOG)


def peer() -> str:
    return "x"


def test_a_burst_is_logged_line_by_line(client_log: RateLimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(BURST):
        client_log.log(1000.0, logging.WARNING, "A client was cut off", f"ipv4:{number}".lower, error="too_many_pings")
    assert [each.__dict__["peer"] for each in caplog.records] == [f"ipv4:{number}" for number in range(BURST)]
    assert all("left_out" not in each.__dict__ for each in caplog.records)


def test_lines_above_the_rate_are_counted_and_not_logged(
    client_log: RateLimitedLog, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10_000):
        client_log.log(1000.0 + number / 1000, logging.INFO, "A client broke the protocol", peer, error="y")
    assert BURST + 10 * PER_SECOND - 1 <= len(caplog.records) <= BURST + 10 * PER_SECOND
    left_out = sum(each.__dict__.get("left_out", 0) for each in caplog.records)
    assert 10_000 - 1000 / PER_SECOND <= len(caplog.records) + left_out <= 10_000


def test_a_pause_allows_another_burst(client_log: RateLimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    for now in (1000.0, 1000.0 + BURST / PER_SECOND):
        for _ in range(BURST + 5):
            client_log.log(now, logging.INFO, "A client broke the protocol", peer, error="y")
    assert len(caplog.records) == 2 * BURST
    assert [each.__dict__["left_out"] for each in caplog.records if "left_out" in each.__dict__] == [5]


def test_a_clock_that_goes_backwards_allows_no_further_line(
    client_log: RateLimitedLog, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(BURST + 5):
        client_log.log(1000.0 - number, logging.INFO, "A client broke the protocol", peer, error="y")
    assert len(caplog.records) == BURST
