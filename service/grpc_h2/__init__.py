"""gRPC over HTTP/2 in pure Python: a server on asyncio, and the sans-IO connection that it is built on.

This module is the package's interface. ``docs/engine-api.md`` shows how to serve with it; every other module of the
package is internal and may change at any time. Each name's module is imported when the name is first used. So a program
can use the sans-IO part without an event loop, and a constant without the engine.

**Serving** (asyncio):

- `Server`: serves static methods, and method handlers as ``grpc.aio.Server`` does.
- `MethodHandler`: how a method is served, for programs that do not import gRPC.
- `ServicerContext`: a call, as its handler sees it; the interface of ``grpc.aio.ServicerContext``.
- `TlsCredentials`: certificate, key and client CA of a server, which can be replaced while it runs. `CertificateFault`:
  the files do not make a usable certificate.
- `Trust`: how much the peer of a connection has proved. `Refusal`: why a connection is closed although its peer broke
  no rule.
- `set_listening_options`: prepares a listening socket that several processes share, some of which may be confined.
- `RateLimitedLog`: a log of clients' faults whose rate is limited, so that no client can fill the disk.
- `Http2Protocol`: the asyncio protocol of one connection, for tools that wrap or replace its methods.

**Static methods**: unary methods whose answers exist before a client asks for them.

- `StaticUnary`: a static method, made by `Server.add_static_unary`.
- `StaticAnswer`: one answer: `StaticAnswer.unary` or `StaticAnswer.failure`.
- `Lookup`: message → answer. `Authorize`: metadata → refusal, or None. `Metadata`: name-value pairs.
- `PreparedAnswers`: answers made before the application changes its data: `StaticUnary.prepare`.
- `REMEMBERED_ANSWERS`: the most answers in one of the two generations that a static method remembers.

**Sans-IO**: no socket, no clock, no randomness.

- `Connection`: one client's connection: octets in, events and octets out.
- `Router`: the static methods that a connection serves.
- `Stream`: a call on a connection. `Event`: `CallStarted`, `MessageReceived`, `HalfClosed`, `CallCancelled`,
  `Writable`, `AnswerCutOff`, `ConnectionClosing`.
- `Budget`: the memory that all connections of a server may hold together for their peers.

**For both**:

- `ENGINE`: the form of the engine that runs, ``pure`` Python or ``compiled`` (docs/engine.md).
- `BACKLOG`: how many connections may wait to be accepted.
- `Limits`: the limits of one connection, each with its reason.
- `StatusCode`: status codes of gRPC. `ErrorCode`: error codes of HTTP/2.
- `frame_message`: a message with its prefix. `encode_block`: a header block that needs no dynamic table. `frames`:
  builders and constants of frames, for programs that speak to a server in octets (warm-ups, load generators).
"""

from __future__ import annotations

from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

from grpc_h2.connection.limits import BACKLOG, Limits
from grpc_h2.wire import frames

if TYPE_CHECKING:
    from grpc_h2.aio.admission import Refusal, Trust
    from grpc_h2.aio.call import ServicerContext
    from grpc_h2.aio.handlers import MethodHandler
    from grpc_h2.aio.listening_options import set_listening_options
    from grpc_h2.aio.protocol import Http2Protocol
    from grpc_h2.aio.rate_limited_log import RateLimitedLog
    from grpc_h2.aio.server import Server
    from grpc_h2.aio.tls import CertificateFault, TlsCredentials
    from grpc_h2.connection.budget import Budget
    from grpc_h2.connection.connection import Connection
    from grpc_h2.connection.events import (
        AnswerCutOff,
        CallCancelled,
        CallStarted,
        ConnectionClosing,
        Event,
        HalfClosed,
        MessageReceived,
        Writable,
    )
    from grpc_h2.connection.stream import Stream
    from grpc_h2.rpc.messages import frame_message
    from grpc_h2.rpc.requests import Metadata
    from grpc_h2.rpc.status import StatusCode
    from grpc_h2.static.answer_cache import REMEMBERED_ANSWERS, Lookup, PreparedAnswers
    from grpc_h2.static.answers import StaticAnswer
    from grpc_h2.static.routes import Authorize, Router, StaticUnary
    from grpc_h2.wire.errors import ErrorCode
    from grpc_h2.wire.hpack import encode_block

__all__ = [
    "BACKLOG",
    "ENGINE",
    "REMEMBERED_ANSWERS",
    "AnswerCutOff",
    "Authorize",
    "Budget",
    "CallCancelled",
    "CallStarted",
    "CertificateFault",
    "Connection",
    "ConnectionClosing",
    "ErrorCode",
    "Event",
    "HalfClosed",
    "Http2Protocol",
    "Limits",
    "Lookup",
    "MessageReceived",
    "Metadata",
    "MethodHandler",
    "PreparedAnswers",
    "RateLimitedLog",
    "Refusal",
    "Router",
    "Server",
    "ServicerContext",
    "StaticAnswer",
    "StaticUnary",
    "StatusCode",
    "Stream",
    "TlsCredentials",
    "Trust",
    "Writable",
    "encode_block",
    "frame_message",
    "frames",
    "set_listening_options",
]

# One module that is imported here anyway shows the form: either all modules of the list in pyproject.toml are compiled,
# or none is.
ENGINE: Final = "pure" if isinstance(frames.frame, FunctionType) else "compiled"

_HOMES = {
    "AnswerCutOff": "grpc_h2.connection.events",
    "Authorize": "grpc_h2.static.routes",
    "Budget": "grpc_h2.connection.budget",
    "CallCancelled": "grpc_h2.connection.events",
    "CallStarted": "grpc_h2.connection.events",
    "CertificateFault": "grpc_h2.aio.tls",
    "Connection": "grpc_h2.connection.connection",
    "ConnectionClosing": "grpc_h2.connection.events",
    "ErrorCode": "grpc_h2.wire.errors",
    "Event": "grpc_h2.connection.events",
    "HalfClosed": "grpc_h2.connection.events",
    "Http2Protocol": "grpc_h2.aio.protocol",
    "Lookup": "grpc_h2.static.answer_cache",
    "MessageReceived": "grpc_h2.connection.events",
    "Metadata": "grpc_h2.rpc.requests",
    "MethodHandler": "grpc_h2.aio.handlers",
    "PreparedAnswers": "grpc_h2.static.answer_cache",
    "REMEMBERED_ANSWERS": "grpc_h2.static.answer_cache",
    "RateLimitedLog": "grpc_h2.aio.rate_limited_log",
    "Refusal": "grpc_h2.aio.admission",
    "Router": "grpc_h2.static.routes",
    "Server": "grpc_h2.aio.server",
    "ServicerContext": "grpc_h2.aio.call",
    "StaticAnswer": "grpc_h2.static.answers",
    "StaticUnary": "grpc_h2.static.routes",
    "StatusCode": "grpc_h2.rpc.status",
    "Stream": "grpc_h2.connection.stream",
    "TlsCredentials": "grpc_h2.aio.tls",
    "Trust": "grpc_h2.aio.admission",
    "Writable": "grpc_h2.connection.events",
    "encode_block": "grpc_h2.wire.hpack",
    "frame_message": "grpc_h2.rpc.messages",
    "set_listening_options": "grpc_h2.aio.listening_options",
}
"""Name → the module that defines it."""


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value
