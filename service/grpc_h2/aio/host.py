"""What the protocol of a connection needs of its surroundings: its server, and the listener that accepted it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from grpc_h2.aio.admission import Refusal
from grpc_h2.aio.rate_limited_log import RateLimitedLog
from grpc_h2.aio.scheduler import FairScheduler
from grpc_h2.connection.budget import Budget
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.stream import Stream
from grpc_h2.static.routes import Router

if TYPE_CHECKING:
    from grpc_h2.aio.protocol import Http2Protocol


class Host(Protocol):
    """What a protocol needs of its server."""

    budget: Budget
    client_log: RateLimitedLog
    limits: Limits
    router: Router
    scheduler: FairScheduler
    timer_slack: float
    """Seconds by which a deadline may be noticed late once traffic has brought it forward."""

    def connected(self, protocol: Http2Protocol) -> None:
        """The connection begins."""

    def disconnected(self, protocol: Http2Protocol) -> None:
        """The connection is gone, and its calls have been informed."""

    def call_started(self, protocol: Http2Protocol, stream: Stream) -> None:
        """A call needs a handler. Set ``stream.call``, or end the call."""

    def observe(self, answer_ids: list[int], seconds: float) -> None:
        """A batch of ready answers was written ``seconds`` after its requests were read. The list is not kept."""


class Acceptor(Protocol):
    """The listener that accepted a connection. It is informed of the connection's beginning and end."""

    def vouched(self, protocol: Http2Protocol) -> None:
        """The connection's trust has risen."""

    def abandon(self, protocol: Http2Protocol) -> None:
        """End the connection, which is not established yet."""

    def dismissed(self, protocol: Http2Protocol, refusal: Refusal) -> None:
        """The connection was closed, with nothing wrong in what it sent: log and count that."""

    def closed(self, protocol: Http2Protocol) -> None:
        """The connection has ended."""
