"""The failure of a call: one class, the gRPC status codes that it may carry, and their names in metrics."""

from __future__ import annotations

from enum import IntEnum

from grpc_h2 import StatusCode


class Status(IntEnum):
    """The gRPC status codes with which the server's RPCs end."""

    OK = StatusCode.OK
    INVALID_ARGUMENT = StatusCode.INVALID_ARGUMENT
    NOT_FOUND = StatusCode.NOT_FOUND
    INTERNAL = StatusCode.INTERNAL
    UNAVAILABLE = StatusCode.UNAVAILABLE
    UNAUTHENTICATED = StatusCode.UNAUTHENTICATED

    @property
    def http(self) -> str:
        """The corresponding HTTP status, which is the label in ``avap_requests_total``."""
        return _HTTP[self]


_HTTP = {
    Status.OK: "200",
    Status.INVALID_ARGUMENT: "400",
    Status.UNAUTHENTICATED: "401",
    Status.NOT_FOUND: "404",
    Status.INTERNAL: "500",
    Status.UNAVAILABLE: "503",
}


class CallFailed(Exception):
    """A call ends with ``status`` and ``message``, which the client sees."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
