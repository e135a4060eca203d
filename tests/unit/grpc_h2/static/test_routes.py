"""Answers of static methods: which are remembered, for how long, and that their number and size are bounded."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from tests.support import h2_wire as wire

from grpc_h2.rpc import responses
from grpc_h2.static import answer_cache
from grpc_h2.static.answers import LARGEST_FRAMED, StaticAnswer
from grpc_h2.static.routes import Router, StaticUnary
from grpc_h2.wire.hpack import Decoder


def payload(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


class Catalogue:
    """Answers a message with itself and an edition, and records the messages that it looks up."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.edition = b"1"
        self.method = StaticUnary("/t.S/Get", self.lookup, None)

    def lookup(self, message: bytes) -> StaticAnswer:
        self.asked.append(message)
        return StaticAnswer.unary(message + self.edition)

    def ask(self, message: bytes) -> bytes:
        answer = self.method.answer_payload(payload(message))
        assert answer is not None
        assert answer.message is not None
        return bytes(answer.message)


def test_a_repeated_request_is_looked_up_once() -> None:
    catalogue = Catalogue()
    assert [catalogue.ask(b"a"), catalogue.ask(b"a")] == [b"a1", b"a1"]
    assert catalogue.asked == [b"a"]


def test_after_forget_no_old_answer_is_given() -> None:
    catalogue = Catalogue()
    for number in range(answer_cache.REMEMBERED_ANSWERS + 10):
        catalogue.ask(b"%d" % number)
    catalogue.edition = b"2"
    catalogue.method.forget()
    for number in (0, 5, answer_cache.REMEMBERED_ANSWERS, answer_cache.REMEMBERED_ANSWERS + 9):
        assert catalogue.ask(b"%d" % number) == b"%d2" % number


def test_a_bound_method_that_a_route_holds_gives_new_answers_after_forget() -> None:
    catalogue = Catalogue()
    answer_payload = catalogue.method.answer_payload
    catalogue.ask(b"a")
    catalogue.edition = b"2"
    catalogue.method.forget()
    answer = answer_payload(payload(b"a"))
    assert answer is not None
    assert answer.message == b"a2"


@pytest.mark.requirement("D5")
def test_an_answer_that_is_requested_again_survives_a_generation_and_others_are_dropped() -> None:
    catalogue = Catalogue()
    for number in range(3 * answer_cache.REMEMBERED_ANSWERS):
        catalogue.ask(b"%d" % number)
        catalogue.ask(b"hot")
    assert catalogue.asked.count(b"hot") == 1
    remembered = catalogue.method._answers
    held = remembered.held + sum(map(len, remembered.replaced))
    assert held <= 3 * answer_cache.REMEMBERED_ANSWERS


def test_dropped_answers_are_freed_a_few_at_a_time() -> None:
    catalogue = Catalogue()
    for number in range(1000):
        catalogue.ask(b"%d" % number)
    catalogue.method.forget()
    dropped = catalogue.method._answers.replaced
    assert sum(map(len, dropped)) == 1000
    for number in range(1000 // answer_cache.RELEASED_AT_ONCE):
        catalogue.ask(b"new %d" % number)
    assert dropped == []


@pytest.mark.parametrize(
    "request_payload",
    [b"", b"\0\0\0\0", payload(b"a")[:-1], payload(b"a") + b"x", b"\1" + payload(b"a")[1:], payload(b"a") * 2],
)
def test_a_payload_that_is_not_one_plain_message_is_left_to_the_long_path(request_payload: bytes) -> None:
    catalogue = Catalogue()
    assert catalogue.method.answer_payload(request_payload) is None
    assert catalogue.asked == []


def test_a_header_list_of_1024_octets_is_remembered_and_a_longer_one_is_not() -> None:
    router = Router()
    router.add_static_unary("/t.S/Get", lambda message: StaticAnswer.unary(message))
    fields = Decoder(max_list_size=1000, max_fields=10).decode(b"\x83\x86\x84")
    assert router.route(fields, 1024) is router.route(fields, 1024)
    other = (*fields, (b"a", b"b"))
    assert router.route(other, 1025) is not router.route(other, 1025)


@pytest.mark.requirement("D5")
def test_long_requests_are_not_remembered() -> None:
    catalogue = Catalogue()
    for _ in range(2):
        catalogue.ask(b"x" * 300)
    assert catalogue.asked == [b"x" * 300] * 2


@pytest.mark.requirement("D5")
def test_a_flood_of_failures_evicts_no_answer_and_is_bounded() -> None:
    asked = []

    def lookup(message: bytes) -> StaticAnswer:
        asked.append(message)
        return StaticAnswer.unary(b"ok") if message == b"hot" else StaticAnswer.failure(5, "no")

    method = StaticUnary("/t.S/Get", lookup, None)
    for number in range(3 * answer_cache.REMEMBERED_ANSWERS):
        assert method.answer_payload(payload(b"%d" % number)) is not None
        assert method.answer_payload(payload(b"hot")) is not None
        assert method.answer_payload(payload(b"%d" % number)) is not None
    assert len(asked) == 3 * answer_cache.REMEMBERED_ANSWERS + 1
    assert len(method._answers._failures) <= answer_cache.REMEMBERED_FAILURES
    method.forget()
    method.answer_payload(payload(b"1"))
    assert asked.count(b"1") == 2


def test_an_answer_too_large_for_a_frame_is_not_copied() -> None:
    body = memoryview(bytes(20_000))
    answer = StaticAnswer.unary(body)
    assert answer.pieces is None
    assert answer.message is body


class Large:
    """Answers a message with as many octets as the message asks for."""

    def __init__(self) -> None:
        self.method = StaticUnary("/t.S/Sync", self.lookup, None)
        self.memory = memoryview(bytes(range(256)) * 2000)
        self.lookups = self.shift = 0

    def lookup(self, message: bytes) -> StaticAnswer:
        self.lookups += 1
        return StaticAnswer.unary(self.memory[self.shift :][: int(message)], metadata=MARKED)

    def framed(self, size: int) -> tuple[bytes, ...] | None:
        answer = self.method.answer_payload(payload(b"%d" % size))
        assert answer is not None
        assert answer.pieces is None
        return answer.framed


def test_the_large_answer_that_was_asked_for_last_is_kept_in_frames() -> None:
    large = Large()
    for size in (16_380, 32_763, 32_764, 300_000, LARGEST_FRAMED - 5):
        framed = large.framed(size)
        assert framed is not None
        assert large.framed(size) is framed
        frames, rest = wire.split_frames(b"\0\0\0\7".join(framed))
        assert not rest
        assert {each.stream for each in frames} == {7}
        assert [each.kind for each in frames] == [wire.HEADERS, *[wire.DATA] * (len(frames) - 2), wire.HEADERS]
        body = b"".join(each.payload for each in frames[1:-1])
        assert body == payload(bytes(large.memory[:size]))
        assert [len(each.payload) for each in frames[1:-2]] == [16_384] * (len(frames) - 3)
        assert [each.flags & wire.END_STREAM for each in frames] == [0] * (len(frames) - 1) + [wire.END_STREAM]
        assert (b"catalogue", b"7") in fields_of(frames[0].payload)
    assert large.lookups == 5


def test_an_answer_that_is_larger_than_a_few_hundred_kilobytes_is_not_copied() -> None:
    large = Large()
    for _ in range(2):
        assert large.framed(LARGEST_FRAMED - 4) is None


def test_one_answer_in_frames_is_kept() -> None:
    large = Large()
    for size in (20_000, 30_000, 20_000):
        large.framed(size)
    kept = [each for each in gc.get_objects() if isinstance(each, StaticAnswer) and each.framed is not None]
    views = [each for each in kept if isinstance(each.message, memoryview) and each.message.obj is large.memory.obj]
    assert [each.size for each in views] == [20_005]
    assert large.lookups == 3


def test_an_answer_in_frames_is_dropped_when_the_data_changes() -> None:
    for change in ("forget", "prepare"):
        large = Large()
        before, large.shift = large.framed(20_000), 1
        assert large.framed(20_000) is before
        if change == "forget":
            large.method.forget()
        else:
            prepared = large.method.prepare(large.lookup)
            list(prepared.steps())
            prepared.install()
        after = large.framed(20_000)
        assert after is not None
        assert after != before


MARKED = (("catalogue", "7"),)


def fields_of(block: bytes) -> list[tuple[bytes, bytes]]:
    return [(field[0], field[1]) for field in Decoder(max_list_size=16384, max_fields=100).decode(block)]


def test_the_metadata_of_an_answer_are_sent_in_its_first_header_block() -> None:
    for size in (10, 20_000):
        answer = StaticAnswer.unary(bytes(size), metadata=MARKED)
        assert fields_of(answer.headers) == [*fields_of(StaticAnswer.unary(b"").headers), (b"catalogue", b"7")]
    answer = StaticAnswer.unary(b"ab", metadata=MARKED)
    assert answer.pieces is not None
    assert answer.pieces[1].startswith(answer.headers)
    assert int.from_bytes(answer.pieces[0][:3]) == len(answer.headers)


@pytest.mark.parametrize("message", ["no", "", "ü" * 400, "ü" * 5000], ids=["short", "none", "at_the_limit", "long"])
def test_the_metadata_of_a_failure_are_sent_with_its_status(message: str) -> None:
    fields = fields_of(StaticAnswer.failure(5, message, metadata=MARKED).block)
    assert (b"catalogue", b"7") in fields
    assert (b"grpc-status", b"5") in fields
    assert sum(len(name) + len(value) + 32 for name, value in fields) < responses.MAX_TRAILERS


@pytest.mark.parametrize("metadata", [(("Catalogue", "7"),), (("catalogue", "7" * 3000),)], ids=["name", "size"])
def test_metadata_that_may_not_be_sent_are_refused(metadata: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(ValueError, match="metadata"):
        StaticAnswer.unary(b"", metadata=metadata)
    with pytest.raises(ValueError, match="metadata"):
        StaticAnswer.failure(5, "no", metadata=metadata)


def test_a_failure_that_is_not_lasting_is_looked_up_again() -> None:
    asked = []

    def lookup(message: bytes) -> StaticAnswer:
        asked.append(message)
        return StaticAnswer.failure(13, "a bug", lasting=False)

    method = StaticUnary("/t.S/Get", lookup, None)
    for _ in range(2):
        method.answer_payload(payload(b"x"))
    assert len(asked) == 2


@pytest.mark.requirement("D4")
def test_a_refusal_that_is_not_lasting_is_authorized_again() -> None:
    judged = []

    def authorize(metadata: object) -> StaticAnswer | None:
        judged.append(metadata)
        return StaticAnswer.failure(13, "a bug", lasting=False) if len(judged) == 1 else None

    served = Router()
    served.add_static_unary("/t.S/Get", lambda message: StaticAnswer.unary(message), authorize)
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


# -- answers prepared before the data changes --------------------------------------------------------------------------


def remembering(*messages: bytes) -> Catalogue:
    catalogue = Catalogue()
    for message in messages:
        catalogue.ask(message)
    catalogue.asked.clear()
    return catalogue


def to_come(catalogue: Catalogue) -> Callable[[bytes], StaticAnswer]:
    """The look-up of the next edition of the catalogue."""

    def lookup(message: bytes) -> StaticAnswer:
        catalogue.asked.append(message)
        return StaticAnswer.unary(message + b"2")

    return lookup


def test_prepared_answers_are_given_after_renew_without_a_look_up() -> None:
    catalogue = remembering(b"a", b"b")
    answer_payload = catalogue.method.answer_payload
    prepared = catalogue.method.prepare(to_come(catalogue))
    for steps, _ in enumerate(prepared.steps(), 1):
        assert len(catalogue.asked) == steps, "one look-up a step"
        assert catalogue.ask(b"a") == b"a1", "until then the old answers are given"
    assert catalogue.asked == [b"a", b"b"]
    catalogue.edition = b"2"
    prepared.install()
    assert [catalogue.ask(b"a"), catalogue.ask(b"b")] == [b"a2", b"b2"]
    answer = answer_payload(payload(b"a"))
    assert answer is not None
    assert answer.message == b"a2", "routes of open connections give them, too"
    assert catalogue.asked == [b"a", b"b"]
    assert catalogue.ask(b"c") == b"c2"


def test_all_remembered_answers_are_prepared_the_most_recent_first() -> None:
    def lookup(message: bytes) -> StaticAnswer:
        return StaticAnswer.failure(5, "no") if message.startswith(b"no") else StaticAnswer.unary(message)

    method = StaticUnary("/t.S/Get", lookup, None)
    for number in range(answer_cache.REMEMBERED_ANSWERS + 10):
        method.answer_payload(payload(b"%d" % number))
    method.answer_payload(payload(b"no"))
    asked: list[bytes] = []

    def counted(message: bytes) -> StaticAnswer:
        asked.append(message)
        return lookup(message)

    for _ in method.prepare(counted).steps():
        pass
    assert len(asked) == answer_cache.REMEMBERED_ANSWERS + 11
    assert set(asked[:10]) == {b"%d" % number for number in range(answer_cache.REMEMBERED_ANSWERS, len(asked) - 1)}
    assert asked[10] == b"no"


def test_an_answer_that_was_not_prepared_is_looked_up_on_demand() -> None:
    catalogue = remembering(b"a", b"b", b"c")
    prepared = catalogue.method.prepare(to_come(catalogue))
    next(prepared.steps())
    catalogue.edition = b"2"
    prepared.install()
    assert [catalogue.ask(each) for each in (b"a", b"b", b"c")] == [b"a2", b"b2", b"c2"]
    assert catalogue.asked == [b"a", b"b", b"c"]


def test_answers_prepared_from_data_that_is_not_served_are_never_given() -> None:
    catalogue = remembering(b"a")
    prepared = catalogue.method.prepare(to_come(catalogue))
    list(prepared.steps())
    catalogue.edition = b"3"
    catalogue.method.forget()
    assert prepared.state is answer_cache.Preparation.DISCARDED
    with pytest.raises(RuntimeError, match="discarded"):
        prepared.install()
    assert catalogue.ask(b"a") == b"a3"


def test_a_preparation_ends_early_when_another_begins_or_it_is_installed() -> None:
    catalogue = remembering(b"a", b"b", b"c")
    first = catalogue.method.prepare(to_come(catalogue))
    steps = first.steps()
    next(steps)
    second = catalogue.method.prepare(to_come(catalogue))
    assert first.state is answer_cache.Preparation.DISCARDED
    assert list(steps) == []
    steps = second.steps()
    next(steps)
    second.install()
    assert list(steps) == []
    with pytest.raises(RuntimeError, match="installed"):
        second.install()


def test_replaced_answers_are_freed_a_few_at_a_time_without_another_call() -> None:
    catalogue = remembering(*(b"%d" % number for number in range(1000)))
    for _ in range(3):
        prepared = catalogue.method.prepare(to_come(catalogue))
        list(prepared.steps())
        prepared.install()
        dropped = catalogue.method._answers.replaced
        left = sum(map(len, dropped))
        assert left == 1000
        for _ in catalogue.method.release():
            now = sum(map(len, dropped))
            assert left - now <= answer_cache.RELEASED_AT_ONCE
            left = now
        assert left == 0


def test_an_installed_preparation_keeps_no_answer_alive() -> None:
    def alive() -> int:
        return sum(isinstance(each, StaticAnswer) and each.message in (b"a2", b"b2") for each in gc.get_objects())

    catalogue = remembering(b"a", b"b")
    prepared = catalogue.method.prepare(to_come(catalogue))
    list(prepared.steps())
    prepared.install()
    assert alive() == 2
    catalogue.method._answers.forget()
    for _ in catalogue.method.release():
        pass
    assert alive() == 0, "the preparation would free thousands of answers in one step, when the next one begins"
