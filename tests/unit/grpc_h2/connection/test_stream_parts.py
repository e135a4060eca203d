"""The arithmetic of one stream: its windows, the octets that it holds, and how its output is cut into frames."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.h2_peer import HANDLED, some_router

from grpc_h2.connection.state import ResponseState, StreamState
from grpc_h2.connection.stream import STREAM_WEIGHT, Piece, Stream
from grpc_h2.static.routes import UNKNOWN_LENGTH, Route
from grpc_h2.wire.errors import ErrorCode, StreamFault

WINDOW = 1000


def stream(*, content_length: int = UNKNOWN_LENGTH, send_window: int = WINDOW, fields_size: int = 200) -> Stream:
    """A stream whose call has a handler."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", HANDLED), (b":authority", b"test"),
              (b"te", b"trailers"), (b"content-type", b"application/grpc")]  # fmt: skip
    if content_length != UNKNOWN_LENGTH:
        fields.append((b"content-length", b"%d" % content_length))
    route: Route = some_router().route(tuple(fields), fields_size)
    return Stream(1, route, send_window, WINDOW, None)


# -- receiving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("octets", "fault"), [(WINDOW, None), (WINDOW + 1, ErrorCode.FLOW_CONTROL_ERROR)])
def test_one_octet_beyond_the_stream_window_is_a_flow_control_error(octets: int, fault: ErrorCode | None) -> None:
    made = stream()
    if fault is None:
        made.receive(octets, octets, end_stream=False)
        assert (made.receive_window, made.octets) == (0, octets)
        return
    with pytest.raises(StreamFault, match="DATA beyond the stream's window") as raised:
        made.receive(octets, octets, end_stream=False)
    assert raised.value.code is fault


@pytest.mark.parametrize(("sizes", "left"), [((4, 6), 0), ((4, 7), None), ((10,), 0), ((9,), 1)])
def test_data_beyond_content_length_is_a_protocol_error_and_padding_is_not_counted(
    sizes: tuple[int, ...], left: int | None
) -> None:
    made = stream(content_length=10)
    for size in sizes[:-1]:
        made.receive(size + 5, size, end_stream=False)
    if left is None:
        with pytest.raises(StreamFault, match="more DATA than content-length says") as raised:
            made.receive(sizes[-1], sizes[-1], end_stream=False)
        assert raised.value.code is ErrorCode.PROTOCOL_ERROR
    else:
        made.receive(sizes[-1] + 5, sizes[-1], end_stream=False)
        assert made.body_left == left


def test_data_after_end_stream_is_a_stream_error() -> None:
    made = stream()
    made.receive(1, 1, end_stream=True)
    assert made.state is StreamState.HALF_CLOSED_REMOTE
    with pytest.raises(StreamFault, match="DATA after END_STREAM") as raised:
        made.receive(1, 1, end_stream=False)
    assert raised.value.code is ErrorCode.STREAM_CLOSED
    assert made.octets == 1


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=20))
def test_window_credit_and_owed_octets_always_add_up_to_the_stream_window(frames: list[tuple[int, int]]) -> None:
    made = stream()
    for owed, free in frames:
        if owed + free > made.receive_window:
            break
        made.receive(owed + free, owed + free, end_stream=False)
        made.take_in(owed, free)
        made.consume(0, owed // 2)
        increment = made.window_due()
        assert increment == 0 or 2 * increment >= WINDOW
        assert made.receive_window + made.credit + made.owed == WINDOW


@pytest.mark.parametrize(("credit", "due"), [(WINDOW // 2 - 1, 0), (WINDOW // 2, WINDOW // 2), (WINDOW, WINDOW)])
def test_credit_of_half_the_stream_window_is_given_back_at_once(credit: int, due: int) -> None:
    made = stream()
    made.receive(WINDOW, WINDOW, end_stream=False)
    made.take_in(WINDOW - credit, credit)
    assert made.window_due() == due
    assert (made.receive_window, made.credit) == (due, credit - due)


@pytest.mark.parametrize("how", ["half-closed", "answered"])
def test_a_stream_that_receives_no_more_data_gets_no_window_update(how: str) -> None:
    made = stream()
    made.receive(WINDOW, WINDOW, end_stream=how == "half-closed")
    made.take_in(0, WINDOW)
    if how == "answered":
        made.response_begun()
        made.queue([b"x"])
        made.response_complete(b"trailers")
    assert made.window_due() == 0
    assert made.credit == WINDOW


def test_consuming_a_message_releases_no_more_than_the_stream_holds() -> None:
    made = stream()
    made.hold_message(300)
    made.hold_message(50)
    made.take_in(200, 0)
    assert made.consume(228, 105) == (228, 105)
    assert (made.unread, made.owed, made.credit) == (122, 95, 105)
    assert made.consume(228, 105) == (122, 95)
    assert (made.unread, made.owed, made.credit) == (0, 0, 200)
    made.hold_message(7)
    made.take_in(5, 0)
    assert [made.hold_partial(octets) for octets in (9, 4, 4)] == [9, -5, 0]
    assert made.discard_body() == (4, 7, 5)
    assert made.discard_body() == (0, 0, 0)


def test_weigh_adds_up_the_octets_of_complete_messages() -> None:
    made = stream()
    assert [made.weigh(octets) for octets in (5, 0, 7)] == [5, 5, 12]


# -- sending -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.binary(max_size=40) | st.binary(max_size=40).map(memoryview), max_size=8),
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
)
def test_frames_carry_the_octets_in_order_and_stay_within_room_and_window(
    pieces: list[Piece], rooms: list[int]
) -> None:
    made = stream(send_window=120)
    assert made.queue(pieces) == made.unsent == sum(map(len, pieces))
    whole, sent = b"".join(pieces), b""
    for room in rooms:
        window = made.send_window
        parts = b"".join(made.next_frame(room))
        assert len(parts) == min(room, window, len(whole) - len(sent)), "as much as may be sent"
        sent += parts
        assert made.send_window == window - len(parts)
        assert made.unsent == len(whole) - len(sent)
        assert 0 <= made.own_unsent <= made.unsent
    assert whole.startswith(sent)
    assert made.drop_queue() == len(whole) - len(sent)
    assert (made.unsent, made.own_unsent, made.next_frame(10)) == (0, 0, [])


@pytest.mark.parametrize(
    ("octets", "most", "window", "frames"),
    [
        (10, 9, 1000, 3), (10, 2, 1000, 2), (10, 0, 1000, 0), (10, 9, 25, 2), (10, 9, 9, 0), (31, 9, 1000, 0),
        (30, 9, 1000, 0), (29, 9, 1000, 1),
    ],
)  # fmt: skip
def test_whole_frames_does_not_take_the_last_octets_of_a_piece(
    octets: int, most: int, window: int, frames: int
) -> None:
    made = stream(send_window=window)
    assert made.whole_frames(octets, most) == []
    piece = bytes(range(31)) if octets != 30 else bytes(range(30))
    made.queue([piece])
    found = made.whole_frames(octets, most)
    assert [bytes(each) for each in found] == [piece[at * octets : (at + 1) * octets] for at in range(frames)]
    taken = frames * octets
    assert (made.send_window, made.unsent, made.own_unsent) == (window - taken, len(piece) - taken, len(piece) - taken)
    assert b"".join(made.next_frame(100)) == piece[taken:][: window - taken]


def test_octets_in_memory_of_the_application_are_not_counted_as_memory_of_the_stream() -> None:
    made = stream()
    shared = memoryview(bytearray(50))
    made.queue([b"prefix", shared, memoryview(b"copy"), b""])
    assert (made.unsent, made.own_unsent) == (60, 10)
    made.whole_frames(10, 3)
    assert [len(part) for part in made.next_frame(6)] == [6]
    assert (made.unsent, made.own_unsent) == (54, 4)
    assert len(made.whole_frames(20, 9)) == 2
    assert (made.unsent, made.own_unsent) == (14, 4)


@pytest.mark.parametrize(
    ("window", "increment", "grows"), [(10, 5, True), (2**31 - 2, 1, True), (2**31 - 1, 1, False), (-7, 3, True)]
)
def test_a_send_window_grows_up_to_the_maximum_and_may_be_negative(window: int, increment: int, grows: bool) -> None:
    made = stream(send_window=window)
    assert made.grow_send_window(increment) is grows
    assert made.send_window == window + (increment if grows else 0)


def test_a_stream_is_not_writable_from_the_high_water_mark_until_the_low_water_mark() -> None:
    made = stream()
    made.queue([bytes(100)])
    made.note_queued(100)
    assert made.writable
    made.queue([b"x"])
    made.note_queued(100)
    assert not made.writable
    made.next_frame(50)
    assert not made.note_sent(50)
    made.next_frame(1)
    assert made.note_sent(50)
    assert made.writable
    assert not made.note_sent(50), "it is reported once"


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_ended", [True, False])
@pytest.mark.parametrize("headers", [True, False])
def test_the_end_of_a_response_closes_the_stream_or_its_local_half(request_ended: bool, headers: bool) -> None:
    made = stream()
    if request_ended:
        made.request_ended()
    if headers:
        made.response_begun()
        assert made.headers_sent
        assert not made.closed
    made.response_ended()
    assert made.closed
    assert made.state is (StreamState.CLOSED if request_ended else StreamState.HALF_CLOSED_LOCAL)
    assert made.response is (ResponseState.END_SENT if headers else ResponseState.TRAILERS_ONLY)


def test_a_new_stream_has_sent_nothing_and_is_writable() -> None:
    made = stream()
    assert (made.handled, made.finished, made.closed, made.headers_sent, made.writable) == (
        True, False, False, False, True,
    )  # fmt: skip
    assert made.weight == STREAM_WEIGHT
    assert stream(fields_size=2000).weight == STREAM_WEIGHT + 2000, "long fields count, too"
    made.finish()
    assert made.finished
    made.close()
    assert (made.closed, made.state) == (True, StreamState.CLOSED)
