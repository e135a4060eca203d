"""docs/requirements.md and the tests agree: each row has a test, and each marker names a row."""

from __future__ import annotations

import pytest
from tests.support.requirements import PAGE as REQUIREMENTS
from tests.support.requirements import BadMarker, differences, main, marked_tests, rows, sources

from grpc_h2 import Limits

LIMITS = Limits()
INFLATIONS_AT_ONCE = 8
NUMBERS = (
    f"`Limits.glitches`: {LIMITS.glitches:,}, refilled at {LIMITS.glitches_per_second:.0f} a second",
    f"{LIMITS.max_continuations} frames; {LIMITS.max_header_block // 1024} KiB; {LIMITS.header_timeout:.0f} s",
    f"{LIMITS.max_header_list // 1024} KiB and {LIMITS.max_header_fields} fields",
    f"({LIMITS.hard_header_list // 1024} KiB, {LIMITS.hard_header_fields} fields)",
    f"at most {LIMITS.calls_per_turn} new calls in one time slice",
    f"{LIMITS.replies_per_turn:,} queued replies",
    f"{LIMITS.free_window_updates} + 2 for each stream",
    f"from which nothing is read for {LIMITS.stall_timeout:.0f} s ends",
    f"{LIMITS.max_buffered >> 20} MiB unfinished, {LIMITS.max_unread >> 20} MiB unread",
    f"{LIMITS.max_settings_entries} entries; the bucket",
    f"{LIMITS.preface_timeout:.0f} s for the preface, {LIMITS.header_timeout:.0f} s for a header block",
    f"stops at the limit of the method, by default {LIMITS.max_message >> 20} MiB; {INFLATIONS_AT_ONCE} messages",
    f"{LIMITS.body_timeout:.0f} s for the request",
    f"{LIMITS.drain_body_timeout:.0f} s once the connection drains",
    f"share {LIMITS.max_held >> 20} MiB",
    f"less than {LIMITS.min_read_rate / 1024:.0f} KiB a second, after a grace of {LIMITS.read_grace:.0f} s",
    f"after {LIMITS.max_read_time:.0f} s in any case",
    f"{LIMITS.late_frames_per_stream} frames on ended streams",
    f"A message of more than {LIMITS.max_message >> 20} MiB",
    f"or after {LIMITS.drain_timeout:.0f} s, GOAWAY",
    f"with {LIMITS.age_jitter:.0%} jitter".replace("%", " %"),
    f"After {LIMITS.keepalive_time / 3600:.0f} h of silence",
    f"without an answer within {LIMITS.keepalive_timeout:.0f} s",
    f"more often than every {LIMITS.min_ping_interval:.0f} s on average",
)
"""Limits as the page states them."""

PAGE = """
| id | requirement |
|---|---|
| A1 | the first |
| B-flood | the second |
"""


def module(*decorators: str) -> str:
    return "".join(f"{decorator}\ndef test_{number}(): ...\n" for number, decorator in enumerate(decorators))


def test_each_row_has_a_test_and_each_marker_names_a_row() -> None:
    assert differences(REQUIREMENTS.read_text(), marked_tests(sources())) == []


def test_the_page_has_every_row_of_its_four_parts() -> None:
    known = rows(REQUIREMENTS.read_text())
    assert [each for each in known if each.startswith("A")] == [f"A{number}" for number in range(1, 52)]
    assert [sum(each.startswith(part) for each in known) for part in "BCD"] == [21, 21, 7]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_page_states_the_limits_in_force(number: str) -> None:
    assert number in REQUIREMENTS.read_text()


def test_a_row_that_loses_its_only_test_is_reported() -> None:
    tests = marked_tests(sources())
    only = {identifier: found for identifier, found in tests.items() if len(found) == 1}
    assert only, "no row has only one test"
    for identifier in only:
        rest = {each: found for each, found in tests.items() if each != identifier}
        lines = differences(REQUIREMENTS.read_text(), rest)
        assert any(line.startswith(f"{identifier} has no test") for line in lines)


def test_a_row_without_a_test_and_a_marker_without_a_row_are_reported() -> None:
    tests = marked_tests([("test_a.py", module('@pytest.mark.requirement("A1", "A2")'))])
    assert differences(PAGE, tests) == [
        "B-flood has no test: the second",
        "A2 is not in the page: test_a.py::test_0",
    ]


def test_a_marker_of_a_class_applies_to_its_tests() -> None:
    source = (
        '@pytest.mark.requirement("A1")\nclass TestIt:\n    @mark.requirement("B-flood")\n    def test_b(self): ...\n'
    )
    assert marked_tests([("a", source)]) == {"A1": ["a::TestIt::test_b"], "B-flood": ["a::TestIt::test_b"]}


def test_a_function_that_is_not_a_test_proves_nothing() -> None:
    assert marked_tests([("a", '@pytest.mark.requirement("A1")\ndef check(): ...\n')]) == {}


@pytest.mark.parametrize(
    "decorator",
    ["@pytest.mark.requirement", "@pytest.mark.requirement()", "@pytest.mark.requirement(ROW)",
     "@pytest.mark.requirement(row='A1')", "@pytest.mark.requirement('A' + '1')"],
    ids=["bare", "empty", "name", "keyword", "expression"],
)  # fmt: skip
def test_a_marker_whose_ids_are_not_literals_is_an_error(decorator: str) -> None:
    with pytest.raises(BadMarker):
        marked_tests([("a", module(decorator))])


def test_two_rows_of_one_id_are_an_error() -> None:
    with pytest.raises(ValueError, match="A1"):
        rows(PAGE + "| A1 | again |\n")


def test_the_command_lists_the_tests_of_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["A9"]) == 0
    assert "test_a_ping_is_answered_ahead_of_data_and_the_ack_of_a_ping_is_not_answered" in capsys.readouterr().out
    assert main(["A99"]) == 1
    assert "A99 is not in docs/requirements.md" in capsys.readouterr().err
