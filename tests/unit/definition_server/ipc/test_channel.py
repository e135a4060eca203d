"""The control socket transports every message whole and in order, with a descriptor that becomes the receiver's own.
Neither end ever blocks; send and receive report the end of the other process; invalid datagrams are detected.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.leftovers import descriptors_before, nothing_left, open_descriptors

from definition_server.ipc.channel import MAX_DESCRIPTORS, Channel, ChannelClosed
from definition_server.ipc.messages import (
    FROM_MASTER,
    FROM_WORKER,
    Certificate,
    Configure,
    Drain,
    Keys,
    Mapped,
    Message,
    MessageError,
    Peer,
    PeerGone,
    Publish,
    Ready,
    decode,
    encode,
)

TEXT = st.text(max_size=50)
SECONDS = st.floats(0, 86_400)
COUNT = st.integers(0, 2**64 - 1)
OF_TYPE: dict[object, st.SearchStrategy[object]] = {str: TEXT, int: COUNT, bool: st.booleans(), float: SECONDS}
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Configure, **{name: OF_TYPE[kind] for name, kind in get_type_hints(Configure).items()}),
    st.builds(Certificate, COUNT),
    st.builds(Keys, st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=5).map(tuple)),
    st.builds(Publish, COUNT, TEXT),
    st.builds(Drain, st.booleans(), SECONDS, SECONDS),
    st.builds(Peer, COUNT),
    st.builds(PeerGone, COUNT),
)
ALL = (*FROM_MASTER, *FROM_WORKER)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a control socket. After the test no descriptor may be left."""
    with nothing_left():
        ours, raw = Channel.pair()
        theirs = Channel.of_worker(raw)
        yield ours, theirs
        ours.close()
        theirs.close()


@pytest.fixture
def raw() -> Iterator[tuple[Channel, socket.socket]]:
    """Our end, and the other end as a plain socket."""
    with nothing_left():
        ours, theirs = Channel.pair()
        yield ours, theirs
        ours.close()
        theirs.close()


# -- messages ----------------------------------------------------------------------------------------------------------


@given(MESSAGES | st.builds(Ready, COUNT, TEXT) | st.builds(Mapped))
def test_a_message_is_read_back_as_it_was_written(message: Message) -> None:
    assert decode(encode(message), ALL) == message
    assert type(decode(encode(message), ALL)) is type(message)


@given(st.lists(MESSAGES, max_size=8))
def test_messages_arrive_whole_and_in_order(messages: list[Message]) -> None:
    ours, other = Channel.pair()
    theirs = Channel.of_worker(other)
    with closing(ours), closing(theirs):
        sent = [ours.send(message) for message in messages]
        assert all(sent)
        assert [theirs.receive() for _ in messages] == [(message, ()) for message in messages]
        assert theirs.receive() is None


def test_both_ends_may_send_at_once(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    assert ours.send(Drain(True, 1.5, 2.5))
    assert theirs.send(Ready(3))
    assert ours.receive() == (Ready(3), ())
    assert theirs.receive() == (Drain(True, 1.5, 2.5), ())


def test_messages_hold_keys_only_as_digests() -> None:
    fields = {cls.__name__: cls.__dataclass_fields__.keys() for cls in get_args(Message)}
    assert fields["Keys"] == {"digests"}
    told = [name for names in fields.values() for name in names if "key" in name or "url" in name]
    assert told == []


GARBAGE = [
    b"\0",
    b"\xff\xfe",
    b"null",
    b"[]",
    b'"Ready"',
    b"{}",
    b'{"type": "Ready"}',
    b'{"type": "Ready", "generation": 1, "more": 2}',
    b'{"type": "Unknown"}',
    b'{"type": ["Ready"]}',
    b'{"type": {}}',
    b'{"type": null}',
    b"[" * 4_000,
    b'{"type": "Ready", "generation": 1' + b" " * 5_000 + b"}",
    *(b'{"type": "Ready", "generation": %b}' % value for value in (
        b'"x"', b"-1", b"1.0", b"1e3", b"true", b"null", b"[]", b"{}", b"NaN", b"Infinity", b"18446744073709551616",
        b"9" * 5_000,
    )),
    b'{"type": "Keys", "digests": []}',
    b'{"type": "Drain", "announce": false, "wait_seconds": 0, "timeout_seconds": 0}',
]  # fmt: skip
"""Invalid datagrams for the master. The last ones are messages that only a master sends."""

GARBAGE_FOR_A_WORKER = [
    b'{"type": "Keys"}',
    b'{"type": "Keys", "digests": 5}',
    b'{"type": "Keys", "digests": [5]}',
    b'{"type": "Drain", "announce": 1, "wait_seconds": 0, "timeout_seconds": 0}',
    b'{"type": "Drain", "announce": true, "wait_seconds": NaN, "timeout_seconds": 0}',
    b'{"type": "Drain", "announce": true, "wait_seconds": 0, "timeout_seconds": 1e999}',
    b'{"type": "Ready", "generation": 1}',
    encode(Publish(1, "a" * 5_000)),
]


@pytest.mark.parametrize("datagram", GARBAGE)
def test_an_invalid_datagram_is_an_error_and_the_next_message_is_received(
    raw: tuple[Channel, socket.socket], datagram: bytes
) -> None:
    ours, theirs = raw
    theirs.send(datagram)
    theirs.send(encode(Ready(1)))
    with pytest.raises(MessageError) as refused:
        ours.receive()
    assert len(str(refused.value)) < 700, "for a log line"
    assert ours.receive() == (Ready(1), ())


@pytest.mark.parametrize("datagram", GARBAGE_FOR_A_WORKER)
def test_a_worker_refuses_an_invalid_datagram(datagram: bytes) -> None:
    with pytest.raises(MessageError, match="not a control message"):
        decode(datagram, FROM_MASTER)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(
    st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode)
    | st.fixed_dictionaries({"type": st.sampled_from([cls.__name__ for cls in ALL]) | JSON, "generation": JSON})
    .map(json.dumps).map(str.encode)
)  # fmt: skip
def test_any_datagram_yields_a_checked_message_or_a_message_error(datagram: bytes) -> None:
    try:
        message = decode(datagram, FROM_WORKER)
    except MessageError:
        return
    assert message == Mapped() or (isinstance(message, Ready) and type(message.generation) is int)


@pytest.mark.parametrize("count", [1, 2, 250])
def test_descriptors_sent_to_the_master_are_refused_and_never_open_in_it(
    raw: tuple[Channel, socket.socket], count: int
) -> None:
    ours, theirs = raw
    before = descriptors_before().keys()
    for content in (encode(Ready(1)), b"garbage"):
        socket.send_fds(theirs, [content], [theirs.fileno()] * count)
        with pytest.raises(MessageError, match="descriptors"):
            ours.receive()
        assert open_descriptors().keys() == before


def test_a_worker_closes_the_descriptors_of_a_message_that_it_refuses() -> None:
    with nothing_left():
        ours, end = Channel.pair()
        theirs = Channel.of_worker(end)
        before = descriptors_before().keys()
        for content, count in ((b"garbage", 1), (encode(Publish(1, "aa")), MAX_DESCRIPTORS + 1)):
            socket.send_fds(ours._socket, [content], [theirs.fileno()] * count)
            with pytest.raises(MessageError):
                theirs.receive()
            assert open_descriptors().keys() == before
        ours.close()
        theirs.close()


@pytest.mark.parametrize("number", [-1, 2**64])
def test_a_number_beyond_64_bits_without_a_sign_is_refused(number: int) -> None:
    with pytest.raises(MessageError, match="unsigned 64-bit"):
        decode(encode(Publish(number, "a")), FROM_MASTER)


def test_a_text_and_a_list_are_read_up_to_their_limits_and_refused_beyond() -> None:
    for message in (Publish(1, "a" * 4096), Keys(("a" * 64,) * 256)):
        assert decode(encode(message), FROM_MASTER) == message
    for longer in (Publish(1, "a" * 4097), Keys(("a" * 64,) * 257)):
        with pytest.raises(MessageError):
            decode(encode(longer), FROM_MASTER)


@pytest.mark.parametrize(("to_the_master", "most"), [(True, 4096), (False, 65_536)], ids=["to master", "to worker"])
def test_a_datagram_is_read_up_to_the_limit_and_refused_beyond(to_the_master: bool, most: int) -> None:
    with nothing_left():
        ours, raw = Channel.pair()
        sender, receiver = (raw, ours) if to_the_master else (ours._socket, Channel.of_worker(raw))
        sender.send(b"x" * most)
        with pytest.raises(MessageError, match=r"^(?!.*longer than)"):
            receiver.receive()
        sender.send(b"x" * (most + 1))
        with pytest.raises(MessageError, match=f"longer than {most} octets"):
            receiver.receive()
        ours.close()
        raw.close()


def test_an_empty_datagram_is_read_as_the_end(raw: tuple[Channel, socket.socket]) -> None:
    ours, theirs = raw
    theirs.send(b"")
    with pytest.raises(ChannelClosed):
        ours.receive()


def test_descriptors_sent_with_an_empty_datagram_are_closed(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    before = descriptors_before().keys()
    socket.send_fds(ours._socket, [b""], [ours.fileno()] * 2)
    with pytest.raises(ChannelClosed):
        theirs.receive()
    assert open_descriptors().keys() == before


# -- descriptors -------------------------------------------------------------------------------------------------------


def test_a_descriptor_arrives_as_one_of_the_receivers_own(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    sent = os.memfd_create("test")
    os.write(sent, b"snapshot")
    assert ours.send(Publish(1, "aa"), sent)
    identity = os.fstat(sent).st_ino
    os.close(sent)  # the receiver's descriptor stays open
    received = theirs.receive()
    assert received is not None
    message, (descriptor,) = received
    assert message == Publish(1, "aa")
    try:
        assert os.pread(descriptor, 100, 0) == b"snapshot"
        assert os.fstat(descriptor).st_ino == identity
    finally:
        os.close(descriptor)


def test_a_received_descriptor_is_not_inherited_by_default(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    assert ours.send(Publish(1, "aa"), ours.fileno())
    received = theirs.receive()
    assert received is not None
    (descriptor,) = received[1]
    try:
        assert os.get_inheritable(descriptor) is False
    finally:
        os.close(descriptor)


def test_descriptors_stay_with_their_messages(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    files = [os.memfd_create(f"test{number}") for number in range(3)]
    for number, file in enumerate(files):
        os.write(file, b"%d" % number)
        assert ours.send(Publish(number, ""), file)
        assert ours.send(Certificate(number))
        os.close(file)
    for number in range(3):
        received = theirs.receive()
        assert received is not None
        message, (descriptor,) = received
        assert message == Publish(number, "")
        assert os.pread(descriptor, 9, 0) == b"%d" % number
        os.close(descriptor)
        assert theirs.receive() == (Certificate(number), ())


def test_several_descriptors_arrive_in_order(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    files = [os.memfd_create(f"test{number}") for number in range(MAX_DESCRIPTORS)]
    assert ours.send(Certificate(1), *files)
    received = theirs.receive()
    assert received is not None
    assert [os.fstat(got).st_ino for got in received[1]] == [os.fstat(sent).st_ino for sent in files]
    for descriptor in (*files, *received[1]):
        os.close(descriptor)


# -- the ends ----------------------------------------------------------------------------------------------------------


def test_receive_without_a_message_does_not_block(ends: tuple[Channel, Channel]) -> None:
    for end in ends:
        assert os.get_blocking(end.fileno()) is False
        assert end.receive() is None


def test_send_to_a_full_queue_returns_false_until_it_is_read(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    sent = 0
    while ours.send(Certificate(sent)):
        sent += 1
        assert sent < 1_000_000
    assert sent > 0
    assert ours.send(Certificate(sent)) is False
    assert theirs.receive() == (Certificate(0), ())
    assert ours.send(Certificate(sent)) is True
    received = [message.revision for message, _ in iter(theirs.receive, None) if isinstance(message, Certificate)]
    assert received == list(range(1, sent + 1))  # no message is lost, and none arrives twice


def test_a_full_queue_keeps_the_descriptor_with_its_sender(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    while ours.send(Certificate(1)):
        pass
    before = descriptors_before().keys()
    assert ours.send(Publish(1, ""), theirs.fileno()) is False
    assert open_descriptors().keys() == before


@pytest.mark.parametrize("error", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS, errno.EPIPE, errno.EBADF])
def test_a_kernel_that_lacks_a_resource_is_asked_again_and_any_other_error_is_the_end(
    ends: tuple[Channel, Channel], error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(socket, "send_fds", refuse)
    if error in (errno.EPIPE, errno.EBADF):
        with pytest.raises(ChannelClosed, match=os.strerror(error)):
            ends[0].send(Ready(1))
    else:
        assert ends[0].send(Ready(1)) is False


def test_send_to_a_closed_peer_raises_channel_closed(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    theirs.close()
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            ours.send(Ready(1))


def test_receive_from_a_closed_peer_raises_channel_closed(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    theirs.close()
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            ours.receive()


def test_messages_sent_before_the_peer_closed_still_arrive(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    assert theirs.send(Ready(1))
    theirs.close()
    assert ours.receive() == (Ready(1), ())
    with pytest.raises(ChannelClosed):
        ours.receive()


def test_a_peer_that_closed_without_reading_raises_channel_closed(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    assert ours.send(Ready(1))
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.receive()


def test_an_inherited_end_works_and_is_not_inherited_further() -> None:
    with nothing_left():
        ours, raw = Channel.pair()
        os.set_inheritable(raw.fileno(), True)
        theirs = Channel.inherited(raw.detach())
        assert os.get_inheritable(theirs.fileno()) is False
        assert os.get_inheritable(ours.fileno()) is False
        assert theirs.send(Ready(1))
        assert ours.receive() == (Ready(1), ())
        ours.close()
        theirs.close()
