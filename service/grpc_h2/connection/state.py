"""The states of a stream, of its response and of a connection, each an enum with its diagram.

A stream, as RFC 9113 section 5.1 draws it, without the states that a server which never pushes cannot reach. ``H``: a
HEADERS frame of the client opens the stream; ``ES``: END_STREAM; ``R``: RST_STREAM, sent or received::

                       +--------+
                       |  IDLE  |                ids that the client has not used; no `Stream` exists
                       +--------+
                            | recv H
                            v
                       +--------+
       recv ES ________|  OPEN  |________ send ES
              |        +--------+        |
              v             | R          v
       +-------------+      |     +-------------+
       | HALF_CLOSED |      |     | HALF_CLOSED |
       |   _REMOTE   |      |     |   _LOCAL    |  left at once: we send RST_STREAM NO_ERROR (section 8.1)
       +-------------+      |     +-------------+
              | send ES / R |            | R
              v             v            v
              +----------- CLOSED -------+

The response has a state of its own (PROTOCOL-HTTP2.md, Responses)::

    NOTHING_SENT ──▶ HEADERS_SENT ──▶ END_QUEUED ──▶ END_SENT
         └───────────────────────────────────▶ TRAILERS_ONLY

END_QUEUED: the call has its status, and the trailers wait behind the stream's data.

A connection::

    AWAITS_PREFACE ──▶ AWAITS_SETTINGS ──▶ OPEN ──▶ DRAINING ──▶ LEAVING ──▶ CLOSED
                                             (CLOSED may follow each state)

DRAINING: the first GOAWAY is sent, calls are still accepted. LEAVING: the last GOAWAY is sent, calls that it names are
served (section 6.8). CLOSED: nothing is read or begun any more; queued output is flushed.
"""

from __future__ import annotations

from enum import Enum, auto


class StreamState(Enum):
    """RFC 9113 section 5.1."""

    following: tuple[StreamState, ...]
    """The legal next states. They are a tuple and not a set in all enums, because hashing a member takes 0.2 µs.

    Looking up ``StreamState.OPEN`` takes the same time in Python 3.11, so code that runs for every call compares with a
    constant of its own module, or reads an attribute that changes with the state (`Lifecycle.closed`,
    ``Stream.closed``)."""

    IDLE = auto()
    OPEN = auto()
    HALF_CLOSED_REMOTE = auto()
    HALF_CLOSED_LOCAL = auto()
    CLOSED = auto()


class ResponseState(Enum):
    """The part of a response that has been sent."""

    following: tuple[ResponseState, ...]

    NOTHING_SENT = auto()
    HEADERS_SENT = auto()
    END_QUEUED = auto()
    END_SENT = auto()
    TRAILERS_ONLY = auto()


class ConnectionState(Enum):
    """The state of a connection: see the diagram in the module's docstring."""

    following: tuple[ConnectionState, ...]

    AWAITS_PREFACE = auto()
    AWAITS_SETTINGS = auto()
    OPEN = auto()
    DRAINING = auto()
    LEAVING = auto()
    CLOSED = auto()


class StreamStatus(Enum):
    """The status of a stream id that a frame names and that belongs to no open stream."""

    IDLE = auto()
    """The id is higher than every id that the client has used."""
    SKIPPED = auto()
    """The client used a higher id first, so the stream is closed without ever having been open (section 5.1.1)."""
    RESET = auto()
    """The server has reset or ended the stream a short while ago: frames that were in flight still arrive, and are
    dropped."""
    CLOSED = auto()


StreamState.IDLE.following = (StreamState.OPEN,)
StreamState.OPEN.following = (StreamState.HALF_CLOSED_REMOTE, StreamState.HALF_CLOSED_LOCAL, StreamState.CLOSED)
StreamState.HALF_CLOSED_REMOTE.following = (StreamState.CLOSED,)
StreamState.HALF_CLOSED_LOCAL.following = (StreamState.CLOSED,)
StreamState.CLOSED.following = ()

ResponseState.NOTHING_SENT.following = (ResponseState.HEADERS_SENT, ResponseState.TRAILERS_ONLY)
ResponseState.HEADERS_SENT.following = (ResponseState.END_QUEUED, ResponseState.END_SENT)
ResponseState.END_QUEUED.following = (ResponseState.END_SENT,)
ResponseState.END_SENT.following = ()
ResponseState.TRAILERS_ONLY.following = ()

ConnectionState.AWAITS_PREFACE.following = (ConnectionState.AWAITS_SETTINGS, ConnectionState.CLOSED)
ConnectionState.AWAITS_SETTINGS.following = (ConnectionState.OPEN, ConnectionState.CLOSED)
ConnectionState.OPEN.following = (ConnectionState.DRAINING, ConnectionState.CLOSED)
ConnectionState.DRAINING.following = (ConnectionState.LEAVING, ConnectionState.CLOSED)
ConnectionState.LEAVING.following = (ConnectionState.CLOSED,)
ConnectionState.CLOSED.following = ()

_ACCEPTING = (ConnectionState.OPEN, ConnectionState.DRAINING)
_CLOSED = ConnectionState.CLOSED

INTRODUCED = (ConnectionState.OPEN, ConnectionState.DRAINING, ConnectionState.LEAVING)
"""States in which the client's preface and its first SETTINGS have arrived."""


class Lifecycle:
    """The state of one connection."""

    __slots__ = ("accepting", "closed", "state")

    def __init__(self) -> None:
        self.state = ConnectionState.AWAITS_PREFACE
        self.accepting = False
        """Whether the client may begin calls: the state is OPEN or DRAINING."""
        self.closed = False
        """Whether nothing is read or begun any more: the state is CLOSED."""

    def enter(self, state: ConnectionState) -> None:
        """Change to ``state``, which must be a legal next state."""
        assert state in self.state.following, f"{self.state} → {state}"
        self.state = state
        self.accepting = state in _ACCEPTING
        self.closed = state is _CLOSED
