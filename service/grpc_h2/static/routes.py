"""The way from a request's header fields to a static method, and the methods themselves.

**Theory of operation.** A unary method whose answers are known octets needs no handler. Three memos lead from request
to answer, each valid for a reason of its own:

- *block → route*, per connection (``connection/headers.py``): valid while the connection's HPACK table does not change.
- *fields → route* (`Router`): interpreting fields is a pure function; only authorizations may change, so a key rotation
  drops this memo.
- *message → answer* (``answer_cache.py``): valid until the application reports that its data changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from grpc_h2.rpc.faults import CallFault, HttpFault
from grpc_h2.rpc.requests import Metadata, Request, interpret
from grpc_h2.static.answer_cache import AnswerCache, Lookup, PreparedAnswers
from grpc_h2.static.answers import StaticAnswer
from grpc_h2.wire.hpack import Field

Authorize: TypeAlias = Callable[[Metadata], StaticAnswer | None]
"""Metadata → the refusal that is the answer, or None to admit the call. The function must not raise."""

_REMEMBERED_ROUTES: Final = 256
_LARGEST_REMEMBERED_FIELDS: Final = 1024
UNKNOWN_LENGTH: Final = -1


class StaticUnary:
    """A unary method with static answers: `Server.add_static_unary`."""

    __slots__ = ("_answers", "_preparation", "answer_payload", "authorize", "lookup", "path")

    def __init__(self, path: str, lookup: Lookup, authorize: Authorize | None) -> None:
        self.path = path
        self.lookup = lookup
        self.authorize = authorize
        self._answers = AnswerCache(lookup)
        self._preparation: PreparedAnswers | None = None
        self.answer_payload: Callable[[bytes], StaticAnswer | None] = self._answers.__getitem__
        """Length-prefixed message → answer, or None if the octets are not one plain message."""

    def forget(self) -> None:
        """The application's data changed: drop the remembered answers, and a preparation that is in progress."""
        self._answers.forget()
        self._discard_preparation()

    def prepare(self, lookup: Lookup) -> PreparedAnswers:
        """Begin to prepare answers by ``lookup``, which uses data that is not served yet. Discards an earlier
        preparation."""
        self._discard_preparation()
        self._preparation = PreparedAnswers(self._answers, lookup)
        return self._preparation

    def release(self) -> Iterator[None]:
        """Release answers that were replaced, a few in each step. Calls that look up an answer also release some."""
        while self._answers.replaced:
            self._answers.release_some()
            yield

    def _discard_preparation(self) -> None:
        if self._preparation is not None:
            self._preparation.discard()
            self._preparation = None


class Route:
    """The destination of a request, as far as its header fields decide it. Immutable and shared."""

    __slots__ = (
        "answer_payload",
        "authorized",
        "content_length",
        "fault",
        "lasting",
        "max_request",
        "method",
        "refusal",
        "request",
        "weight",
    )

    def __init__(
        self,
        request: Request | None,
        method: StaticUnary | None = None,
        fault: CallFault | HttpFault | None = None,
        refusal: StaticAnswer | None = None,
        max_request: int | None = None,
        weight: int = 0,
    ) -> None:
        self.request = request
        self.method = method
        """The static method; None if the call has a handler or is a fault."""
        self.refusal = refusal
        """The answer if the call is not authorized; the headers alone decide this."""
        self.max_request = max_request
        """The most octets of a message of the request; None: `Limits.max_message`."""
        self.weight = weight
        """Octets of the header list if it belongs to this call alone; 0 if the router remembers the route."""
        self.authorized = None if method is None else refusal is None
        """Whether the static method has authorized the call; None if the call is not for a static method."""
        self.lasting = refusal is None or refusal.lasting
        """Whether the route may be remembered."""
        # The traceback is removed, because it would hold frames and their variables for as long as the route is
        # remembered.
        self.fault = None if fault is None else fault.with_traceback(None)
        """The answer to the call, once the request has ended."""
        length = request.content_length if request is not None else fault.content_length if fault is not None else None
        self.content_length = UNKNOWN_LENGTH if length is None else length
        self.answer_payload: Callable[[bytes], StaticAnswer | None] | None = None
        """Length-prefixed message → answer, for static methods. A refused call gets the same answer for every
        message."""
        if refusal is not None:
            self.answer_payload = lambda _: refusal
        elif method is not None:
            self.answer_payload = method.answer_payload

    @property
    def refused(self) -> bool:
        """Whether the headers alone decide the answer, so that the answer need not wait for the request's body."""
        return self.fault is not None or self.refusal is not None

    def with_timeout(self, seconds: float) -> Route:
        """The route of the same call with a ``grpc-timeout``, for a handler."""
        assert self.request is not None
        return Route(self.request.with_timeout(seconds), max_request=self.max_request, weight=self.weight)


class Router:
    """The static methods of a server, shared by all its connections."""

    __slots__ = ("_methods", "_request_limits", "_routes", "epoch")

    def __init__(self) -> None:
        self._request_limits: dict[str, int] = {}
        self._methods: dict[str, StaticUnary] = {}
        self._routes: dict[tuple[Field, ...], Route] = {}
        self.epoch = 0
        """Incremented whenever a remembered route may have become wrong."""

    def add_static_unary(self, path: str, lookup: Lookup, authorize: Authorize | None = None) -> StaticUnary:
        """Answer calls of ``path`` with the result of ``lookup`` for their message, without a handler."""
        method = self._methods[path] = StaticUnary(path, lookup, authorize)
        self.forget_authorizations()
        return method

    def limit_requests(self, path: str, octets: int) -> None:
        """Limit a message of a request of ``path`` to ``octets``, both as it is sent and inflated, in place of
        `Limits.max_message`. This applies to static methods and handlers, and only to later calls."""
        self._request_limits[path] = octets
        self.forget_authorizations()

    def forget_authorizations(self) -> None:
        """Keys were rotated: call ``authorize`` anew from now on, also for open connections."""
        self._routes.clear()
        self.epoch += 1

    def route(self, fields: tuple[Field, ...], size: int) -> Route:
        """The route of a request with these ``fields`` (without ``grpc-timeout``); ``size``: octets of their list.

        Raises:
            StreamFault: if the fields do not form a well-formed request.
        """
        route = self._routes.get(fields)
        if route is None:
            route = self._resolve(fields, size if size > _LARGEST_REMEMBERED_FIELDS else 0)
            if size <= _LARGEST_REMEMBERED_FIELDS and route.lasting:
                if len(self._routes) >= _REMEMBERED_ROUTES:
                    self._routes.clear()
                self._routes[fields] = route
        return route

    def judge_anew(self, route: Route) -> Route:
        """The route of the same call under the present authorizations. The right to an answer is judged when the answer
        is given, which may be long after the headers have arrived."""
        if route.method is None or route.method.authorize is None or route.request is None:
            return route
        return self._judge(route.request, route.method, route.weight)

    def _resolve(self, fields: tuple[Field, ...], weight: int) -> Route:
        try:
            request = interpret(fields)
        except (CallFault, HttpFault) as fault:
            return Route(None, fault=fault)
        method = self._methods.get(request.path)
        if method is None:
            return Route(request, max_request=self._request_limits.get(request.path), weight=weight)
        return self._judge(request, method, weight)

    def _judge(self, request: Request, method: StaticUnary, weight: int) -> Route:
        refusal = None if method.authorize is None else method.authorize(request.metadata)
        most = self._request_limits.get(request.path)
        return Route(request, method, refusal=refusal, max_request=most, weight=weight)
