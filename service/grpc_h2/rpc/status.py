"""The status codes of gRPC (grpc/doc/statuscodes.md). Only this module states them."""

from __future__ import annotations

from enum import IntEnum


class StatusCode(IntEnum):
    """``grpc-status``. A ``grpc.StatusCode`` has the same names; its ``value[0]`` is the same number."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16
