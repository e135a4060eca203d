"""Ready answers: what a door remembers, for how long, and that it is bounded."""

from __future__ import annotations

import pytest

from definition_server.http2 import doors
from definition_server.http2.doors import Answer, Doors, StaticUnary


def payload(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


class Catalogue:
    """Answers a message with itself and an edition, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.edition = b"1"
        self.door = StaticUnary("/t.S/Get", self.lookup, None)

    def lookup(self, message: bytes) -> Answer:
        self.asked.append(message)
        return Answer.unary(message + self.edition)

    def ask(self, message: bytes) -> bytes:
        answer = self.door.answer_payload(payload(message))
        assert answer is not None
        assert answer.message is not None
        return bytes(answer.message)


def test_an_answer_is_looked_up_once() -> None:
    catalogue = Catalogue()
    assert [catalogue.ask(b"a"), catalogue.ask(b"a")] == [b"a1", b"a1"]
    assert catalogue.asked == [b"a"]


def test_after_forget_nothing_old_is_answered() -> None:
    catalogue = Catalogue()
    for number in range(doors._REMEMBERED_ANSWERS + 10):
        catalogue.ask(b"%d" % number)
    catalogue.edition = b"2"
    catalogue.door.forget()
    for number in (0, 5, doors._REMEMBERED_ANSWERS, doors._REMEMBERED_ANSWERS + 9):
        assert catalogue.ask(b"%d" % number) == b"%d2" % number


def test_the_bound_method_of_a_route_outlives_forget() -> None:
    catalogue = Catalogue()
    answer_payload = catalogue.door.answer_payload
    catalogue.ask(b"a")
    catalogue.edition = b"2"
    catalogue.door.forget()
    answer = answer_payload(payload(b"a"))
    assert answer is not None
    assert answer.message == b"a2"


def test_what_is_asked_again_survives_a_generation_and_the_rest_is_dropped() -> None:
    catalogue = Catalogue()
    for number in range(3 * doors._REMEMBERED_ANSWERS):
        catalogue.ask(b"%d" % number)
        catalogue.ask(b"hot")
    assert catalogue.asked.count(b"hot") == 1
    remembered = catalogue.door._remembered
    held = len(remembered) + len(remembered._old) + sum(map(len, remembered._dropped))
    assert held <= 3 * doors._REMEMBERED_ANSWERS


def test_dropped_answers_are_freed_bit_by_bit() -> None:
    catalogue = Catalogue()
    for number in range(1000):
        catalogue.ask(b"%d" % number)
    catalogue.door.forget()
    dropped = catalogue.door._remembered._dropped
    assert sum(map(len, dropped)) == 1000
    for number in range(1000 // doors._FREED_AT_ONCE):
        catalogue.ask(b"new %d" % number)
    assert dropped == []


@pytest.mark.parametrize(
    "request_payload",
    [b"", b"\0\0\0\0", payload(b"a")[:-1], payload(b"a") + b"x", b"\1" + payload(b"a")[1:], payload(b"a") * 2],
)
def test_what_is_not_one_plain_message_is_left_to_the_long_way(request_payload: bytes) -> None:
    catalogue = Catalogue()
    assert catalogue.door.answer_payload(request_payload) is None
    assert catalogue.asked == []


def test_long_requests_are_not_remembered() -> None:
    catalogue = Catalogue()
    for _ in range(2):
        catalogue.ask(b"x" * 300)
    assert catalogue.asked == [b"x" * 300] * 2


def test_a_flood_of_failures_drives_out_no_answer_and_is_bounded() -> None:
    asked = []

    def lookup(message: bytes) -> Answer:
        asked.append(message)
        return Answer.unary(b"ok") if message == b"hot" else Answer.failure(5, "no")

    door = StaticUnary("/t.S/Get", lookup, None)
    for number in range(3 * doors._REMEMBERED_ANSWERS):
        assert door.answer_payload(payload(b"%d" % number)) is not None
        assert door.answer_payload(payload(b"hot")) is not None
        assert door.answer_payload(payload(b"%d" % number)) is not None
    assert len(asked) == 3 * doors._REMEMBERED_ANSWERS + 1
    assert len(door._remembered._failures) <= doors._REMEMBERED_FAILURES
    door.forget()
    door.answer_payload(payload(b"1"))
    assert asked.count(b"1") == 2


def test_an_answer_too_large_for_a_frame_is_kept_uncopied() -> None:
    body = memoryview(bytes(20_000))
    answer = Answer.unary(body)
    assert answer.pieces is None
    assert answer.message is body


def test_a_failure_that_need_not_last_is_looked_up_anew() -> None:
    asked = []

    def lookup(message: bytes) -> Answer:
        asked.append(message)
        return Answer.failure(13, "a bug", lasting=False)

    door = StaticUnary("/t.S/Get", lookup, None)
    for _ in range(2):
        door.answer_payload(payload(b"x"))
    assert len(asked) == 2


def test_a_refusal_that_need_not_last_is_judged_anew() -> None:
    judged = []

    def authorize(metadata: object) -> Answer | None:
        judged.append(metadata)
        return Answer.failure(13, "a bug", lasting=False) if len(judged) == 1 else None

    served = Doors()
    served.add_static_unary("/t.S/Get", lambda message: Answer.unary(message), authorize)
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/t.S/Get"),
        (b"content-type", b"application/grpc"),
    )
    first, second, third = (served.route(fields, 200) for _ in range(3))
    assert not first.lasting
    assert second is third
    assert len(judged) == 2
