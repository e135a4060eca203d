"""Requests that cannot be served as a call, each with the answer that it gets. Malformed requests are in
`wire.errors`."""

from __future__ import annotations

from grpc_h2.wire.errors import Http2Error


class CallFault(Http2Error):
    """A call that fails before its handler starts, or because of its messages: ``grpc-status`` and ``grpc-message``.

    ``content_length`` is the value that the request announced, if any; the length of its body must still be judged.
    """

    def __init__(self, status: int, message: str, content_length: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.content_length = content_length


class UnreadableMessage(CallFault):
    """A message of the client that the method's deserializer rejects."""


class HttpFault(Http2Error):
    """A request that is HTTP but not gRPC: ``status``, and a short ``text`` as the body."""

    def __init__(self, status: int, text: str, content_length: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.content_length = content_length
