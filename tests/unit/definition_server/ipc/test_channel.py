"""The control socket transports every message whole and in order, with a descriptor that becomes the receiver's own.
Neither end ever blocks; send and receive report the end of the other process; invalid datagrams are detected.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.leftovers import nothing_left, open_descriptors

from definition_server.ipc.channel import Channel, ChannelClosed
from definition_server.ipc.messages import (
    Certificate,
    Configure,
    Drain,
    Keys,
    Message,
    MessageError,
    Publish,
    Ready,
    decode,
    encode,
)

TEXT = st.text(max_size=50)
SECONDS = st.floats(0, 86_400)
COUNT = st.integers(0, 2**64 - 1)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Configure,
        *(TEXT, COUNT, TEXT, st.booleans(), SECONDS, COUNT, TEXT, TEXT, SECONDS),
        *(COUNT, SECONDS, SECONDS, SECONDS, TEXT, TEXT, TEXT),
    ),
    st.builds(Certificate, COUNT),
    st.builds(Keys, st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=5).map(tuple)),
    st.builds(Publish, COUNT, TEXT),
    st.builds(Drain, st.booleans(), SECONDS, SECONDS),
    st.builds(Ready, COUNT),
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a control socket. After the test nothing of it is left."""
    with nothing_left():
        ours, raw = Channel.pair()
        theirs = Channel(raw)
        yield ours, theirs
        ours.close()
        theirs.close()


@pytest.fixture
def raw() -> Iterator[tuple[Channel, socket.socket]]:
    """Our end, and the other one as a plain socket."""
    with nothing_left():
        ours, theirs = Channel.pair()
        yield ours, theirs
        ours.close()
        theirs.close()


# -- messages ----------------------------------------------------------------------------------------------------------


@given(MESSAGES)
def test_a_message_is_read_back_as_it_was_written(message: Message) -> None:
    assert decode(encode(message)) == message
    assert type(decode(encode(message))) is type(message)


@given(st.lists(MESSAGES, max_size=8))
def test_messages_arrive_whole_and_in_order(messages: list[Message]) -> None:
    ours, other = Channel.pair()
    theirs = Channel(other)
    with closing(ours), closing(theirs):
        sent = [ours.send(message) for message in messages]
        assert all(sent)
        assert [theirs.receive() for _ in messages] == [(message, None) for message in messages]
        assert theirs.receive() is None


def test_both_ends_may_send_at_once(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    assert ours.send(Drain(True, 1.5, 2.5))
    assert theirs.send(Ready(3))
    assert ours.receive() == (Ready(3), None)
    assert theirs.receive() == (Drain(True, 1.5, 2.5), None)


def test_messages_hold_keys_only_as_digests() -> None:
    fields = {cls.__name__: cls.__dataclass_fields__.keys() for cls in get_args(Message)}
    assert fields["Keys"] == {"digests"}
    told = [name for names in fields.values() for name in names if "key" in name or "url" in name]
    assert told == ["tls_key_file"], "the path of a file"


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
    b'{"type": "Keys"}',
    b'{"type": "Keys", "digests": 5}',
    b"[" * 60_000,
]


@pytest.mark.parametrize("datagram", GARBAGE)
def test_an_invalid_datagram_is_an_error_and_the_next_message_is_received(
    raw: tuple[Channel, socket.socket], datagram: bytes
) -> None:
    ours, theirs = raw
    theirs.send(datagram)
    theirs.send(encode(Ready(1)))
    with pytest.raises(MessageError, match="not a control message"):
        ours.receive()
    assert ours.receive() == (Ready(1), None)


@given(
    st.binary(max_size=60) | st.recursive(st.none() | st.integers() | TEXT, st.lists).map(json.dumps).map(str.encode)
)
def test_any_datagram_yields_a_message_or_a_message_error(datagram: bytes) -> None:
    with pytest.raises(MessageError):
        decode(datagram)


def test_an_invalid_datagram_with_a_descriptor_leaves_none_open(raw: tuple[Channel, socket.socket]) -> None:
    ours, theirs = raw
    before = open_descriptors().keys()
    socket.send_fds(theirs, [b"garbage"], [theirs.fileno()])
    with pytest.raises(MessageError):
        ours.receive()
    left = open_descriptors().keys() - before
    for descriptor in left:
        os.close(descriptor)
    assert not left


def test_of_several_descriptors_only_one_is_received(raw: tuple[Channel, socket.socket]) -> None:
    """Nothing would close the others."""
    ours, theirs = raw
    before = open_descriptors().keys()
    socket.send_fds(theirs, [encode(Ready(1))], [theirs.fileno()] * 3)
    assert (ours.receive() or (None, None))[0] == Ready(1)
    arrived = open_descriptors().keys() - before
    for descriptor in arrived:
        os.close(descriptor)
    assert len(arrived) == 1


# -- descriptors -------------------------------------------------------------------------------------------------------


def test_a_descriptor_arrives_as_one_of_the_receivers_own(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    sent = os.memfd_create("test")
    os.write(sent, b"snapshot")
    assert ours.send(Publish(1, "aa"), sent)
    identity = os.fstat(sent).st_ino
    os.close(sent)  # the receiver's stays open
    received = theirs.receive()
    assert received is not None
    message, descriptor = received
    assert message == Publish(1, "aa")
    assert descriptor is not None
    try:
        assert os.pread(descriptor, 100, 0) == b"snapshot"
        assert os.fstat(descriptor).st_ino == identity
    finally:
        os.close(descriptor)


def test_a_received_descriptor_is_not_inherited_by_default(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    assert ours.send(Publish(1, "aa"), ours.fileno())
    _, descriptor = theirs.receive() or (None, None)
    assert descriptor is not None
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
        assert ours.send(Ready(number))
        os.close(file)
    for number in range(3):
        message, descriptor = theirs.receive() or (None, None)
        assert message == Publish(number, "")
        assert descriptor is not None
        assert os.pread(descriptor, 9, 0) == b"%d" % number
        os.close(descriptor)
        assert theirs.receive() == (Ready(number), None)


# -- the ends ----------------------------------------------------------------------------------------------------------


def test_receive_without_a_message_does_not_block(ends: tuple[Channel, Channel]) -> None:
    for end in ends:
        assert os.get_blocking(end.fileno()) is False
        assert end.receive() is None


def test_send_to_a_full_queue_returns_false_until_it_is_read(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    sent = 0
    while ours.send(Ready(sent)):
        sent += 1
        assert sent < 1_000_000
    assert sent > 0
    assert ours.send(Ready(sent)) is False
    assert theirs.receive() == (Ready(0), None)
    assert ours.send(Ready(sent)) is True
    received = [message.generation for message, _ in iter(theirs.receive, None) if isinstance(message, Ready)]
    assert received == list(range(1, sent + 1))  # nothing lost, nothing twice


def test_a_full_queue_keeps_the_descriptor_with_its_sender(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    while ours.send(Ready(1)):
        pass
    before = open_descriptors().keys()
    assert ours.send(Publish(1, ""), theirs.fileno()) is False
    assert open_descriptors().keys() == before


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
    assert ours.receive() == (Ready(1), None)
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
        assert ours.receive() == (Ready(1), None)
        ours.close()
        theirs.close()
