"""The faults of requests that cannot be served as a call, each with its answer. The faults of malformed requests are in
`wire.errors`."""

from __future__ import annotations

from grpc_h2.wire.errors import Http2Error


class CallFault(Http2Error):
    """A call that fails before its handler starts, or because of its messages. The answer is ``grpc-status`` and
    ``grpc-message``.

    ``content_length`` is the value that the request announced, if any, because the length of its body must still be
    judged.
    """

    def __init__(self, status: int, message: str, content_length: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.content_length = content_length


class UnreadableMessage(CallFault):
    """A message of the client that the method's deserializer rejects."""


class HttpFault(Http2Error):
    """A request that is HTTP but not gRPC. The answer has ``status``, and a short ``text`` as the body."""

    def __init__(self, status: int, text: str, content_length: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.content_length = content_length
