"""The control socket between the master and one worker: ``AF_UNIX``/``SOCK_SEQPACKET``, one message per datagram.

A descriptor travels beside its message by ``SCM_RIGHTS`` (``unix(7)``). Both ends are non-blocking. When the process at
the other end has ended, `ChannelClosed` is raised.
"""

from __future__ import annotations

import errno
import os
import socket
import sys

from definition_server.ipc.messages import Message, MessageError, decode, encode

_MAX_DATAGRAM = 64 * 1024
_DESCRIPTOR_SIZE = 4
_SCARCE = (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)
"""Errors that mean that the kernel lacks a resource at the moment, and not that the other end is gone."""


class ChannelClosed(Exception):
    """The process at the other end is gone."""


class Channel:
    """One end of a control socket."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """Our end, and the raw end for a child process (to be closed here once the child has it)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    @classmethod
    def inherited(cls, descriptor: int) -> Channel:
        """The end that this process inherited as ``descriptor``."""
        os.set_inheritable(descriptor, False)
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """Descriptor, for an event loop to watch."""
        return self._socket.fileno()

    def send(self, message: Message, descriptor: int | None = None) -> bool:
        """Send ``message``, with ``descriptor`` if given (the receiver gets one of its own).

        Returns:
            False where it cannot be sent now (the other end does not read, the kernel lacks memory). Try again later.

        Raises:
            ChannelClosed: where the other end is gone.
        """
        descriptors = [] if descriptor is None else [descriptor]
        try:
            socket.send_fds(self._socket, [encode(message)], descriptors)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _SCARCE:
                return False
            raise ChannelClosed(str(error)) from error
        return True

    def receive(self) -> tuple[Message, int | None] | None:
        """The next message and the descriptor that came with it, which the caller closes; None where no message waits.

        Raises:
            ChannelClosed: where the other end is gone.
            MessageError: where the datagram is not a valid message.
        """
        try:
            # Not socket.recv_fds: that ignores its flags, and the descriptor would leak into child processes.
            datagram, ancillary, _, _ = self._socket.recvmsg(
                _MAX_DATAGRAM, socket.CMSG_LEN(_DESCRIPTOR_SIZE), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not datagram:
            raise ChannelClosed("end of stream")
        descriptor = _descriptor(ancillary)
        try:
            return decode(datagram), descriptor
        except MessageError:
            if descriptor is not None:
                os.close(descriptor)
            raise

    def close(self) -> None:
        """Close this end. The other end notices that at once."""
        self._socket.close()


def _descriptor(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return int.from_bytes(data[:_DESCRIPTOR_SIZE], sys.byteorder, signed=True)
    return None
