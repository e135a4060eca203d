"""The control socket between the master and one worker: ``AF_UNIX``/``SOCK_SEQPACKET``, one message per datagram.

Descriptors travel with their message by ``SCM_RIGHTS`` (``unix(7)``), from the master to a worker and never back: the
master's end provides no buffer for descriptors, so the kernel closes any descriptor that a worker sends. Both ends are
non-blocking. When the process at the other end has ended, `ChannelClosed` is raised.
"""

from __future__ import annotations

import errno
import os
import socket
import sys

from definition_server.ipc.messages import FROM_MASTER, FROM_WORKER, Message, MessageError, decode, encode

_MAX_FROM_MASTER = 64 * 1024
_MAX_FROM_WORKER = 4 * 1024
"""The most octets of a datagram from a worker. A longer datagram is refused."""

MAX_DESCRIPTORS = 3
"""The most descriptors that one message may carry: certificate, key and client authorities."""

_DESCRIPTOR_SIZE = 4
_SCARCE = (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)
"""Errors which show that the kernel lacks a resource at the moment, and not that the other end is gone."""


class ChannelClosed(Exception):
    """The process at the other end is gone."""


class Channel:
    """One end of a control socket: the master's, or a worker's."""

    def __init__(self, end: socket.socket, *, expects: tuple[type[Message], ...]) -> None:
        """``expects``: the types of message that the other end may send."""
        end.setblocking(False)
        self._socket = end
        self._expects = expects
        of_worker = expects is FROM_MASTER
        self._most_octets = _MAX_FROM_MASTER if of_worker else _MAX_FROM_WORKER
        # CMSG_LEN is used and not CMSG_SPACE, whose padding has room for one more descriptor.
        self._room = socket.CMSG_LEN(MAX_DESCRIPTORS * _DESCRIPTOR_SIZE) if of_worker else 0

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """The master's end, and the raw end for a worker (the master closes it once the worker has inherited it)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours, expects=FROM_WORKER), theirs

    @classmethod
    def of_worker(cls, end: socket.socket) -> Channel:
        """A worker's end."""
        return cls(end, expects=FROM_MASTER)

    @classmethod
    def inherited(cls, descriptor: int) -> Channel:
        """The worker's end, which this process inherited as ``descriptor``."""
        os.set_inheritable(descriptor, False)
        return cls.of_worker(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """The descriptor, which an event loop can watch."""
        return self._socket.fileno()

    def send(self, message: Message, *descriptors: int) -> bool:
        """Send ``message``, with ``descriptors`` if given (the receiver gets duplicates).

        Returns:
            False if the message cannot be sent now (the other end does not read, or the kernel lacks memory). Try again
            later.

        Raises:
            ChannelClosed: if the other end is gone.
        """
        try:
            socket.send_fds(self._socket, [encode(message)], list(descriptors))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _SCARCE:
                return False
            raise ChannelClosed(str(error)) from error
        return True

    def receive(self) -> tuple[Message, tuple[int, ...]] | None:
        """The next message and its descriptors, which the caller closes; None if no message waits.

        Raises:
            ChannelClosed: if the other end is gone.
            MessageError: if the datagram is not a valid message, or carries descriptors that this end does not take.
        """
        try:
            # socket.recv_fds is not used, because it ignores its flags: the descriptors would leak into child
            # processes.
            datagram, ancillary, flags, _ = self._socket.recvmsg(self._most_octets, self._room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        descriptors = _descriptors(ancillary)
        if not datagram:  # or an empty datagram, which no end sends
            _close(descriptors)
            raise ChannelClosed("end of stream")
        try:
            if flags & socket.MSG_CTRUNC:
                raise MessageError("more descriptors came with a message than it may carry")
            if flags & socket.MSG_TRUNC:
                raise MessageError(f"a message is longer than {self._most_octets} octets")
            return decode(datagram, self._expects), descriptors
        except MessageError:
            _close(descriptors)
            raise

    def close(self) -> None:
        """Close this end. The other end notices that at once."""
        self._socket.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found += (
                int.from_bytes(data[at : at + _DESCRIPTOR_SIZE], sys.byteorder, signed=True)
                for at in range(0, len(data) - len(data) % _DESCRIPTOR_SIZE, _DESCRIPTOR_SIZE)
            )
    return tuple(found)


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
