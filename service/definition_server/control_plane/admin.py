"""Admin HTTP on ``METRICS_PORT``: ``/`` for people, ``/metrics``, ``/livez``, ``/readyz``, ``/freshz``, ``/statusz``.

It runs in a thread with an event loop of its own, so that it answers while the master's event loop is busy. ``/livez``
shows when the master's loop last ran, so a master that hangs is noticed. Untrusted clients may reach this port. So the
work for one client is bounded (`admin_port`), and the pages show numbers, names and reasons from a fixed list
(`observability.reasons`), and never the text of an error.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from definition_server.control_plane.admin_http import Answer, Request, precondition, text_answer
from definition_server.control_plane.admin_port import BACKLOG, AdminPort
from definition_server.control_plane.listener import PortInUse, reason_text
from definition_server.observability.status import ServiceStatus

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class AdminServer:
    """The admin port and its thread."""

    def __init__(
        self, host: str, port: int, *, read: Callable[[], ServiceStatus], alive: Callable[[], str | None]
    ) -> None:
        """Open the port.

        Args:
            host: Address to bind; ``::`` takes IPv4 connections too.
            port: Port to bind; 0 takes a free one.
            read: Returns the service's present status; called from this server's thread.
            alive: Returns None if the master's event loop runs, else the problem.

        Raises:
            PortInUse: if the port cannot be opened.
        """
        self._listening = _listen(host, port)
        self.port: int = self._listening.getsockname()[1]
        self._pages = _Pages(read, alive)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="admin-http", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Close the port and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._listening.close()
        if not self._loop.is_closed():
            self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        port = AdminPort(self._listening, self._pages.answer)
        self._loop.call_soon(port.open)
        try:
            self._loop.run_forever()
        finally:
            port.close()
            self._loop.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host:port``. ``host`` is an address, so that no name server is needed.

    ``::`` means every address, IPv4 included, whatever ``net.ipv6.bindv6only`` says; on a machine without IPv6 it means
    every IPv4 address. ``SO_REUSEADDR``: a restart does not wait for TIME_WAIT; a second listener is still refused.
    """
    host = host.removeprefix("[").removesuffix("]")
    dual = host == "::"
    try:
        try:
            return socket.create_server(
                (host, port),
                family=socket.AF_INET6 if ":" in host else socket.AF_INET,
                backlog=BACKLOG,
                dualstack_ipv6=dual,
            )
        except OSError as error:
            if not dual or error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
            return socket.create_server(("0.0.0.0", port), backlog=BACKLOG)
    except OSError as error:
        raise PortInUse(reason_text(host, port, "METRICS_PORT", error)) from error


_INSTANTS = frozenset(
    (
        *("at", "since", "started_at", "created_at", "published_at", "last_attempt", "last_success", "last_failure"),
        *("next_attempt", "held_since", "pinned_until"),
    )
)
_INSTANTS_BY_NAME = frozenset(("keys_last_used", "certificates_expire"))


def shown(value: Any, name: str = "", outer: str = "") -> Any:
    """A status for JSON: seconds since the epoch become ISO 8601 in UTC, and a time of 0 becomes null."""
    if isinstance(value, dict):
        return {key: shown(item, key, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if isinstance(value, float | int) and (name in _INSTANTS or outer in _INSTANTS_BY_NAME):
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="milliseconds") if value else None
    return value


class _Pages:
    """The function that answers each path."""

    def __init__(self, read: Callable[[], ServiceStatus], alive: Callable[[], str | None]) -> None:
        self._read = read
        self._alive = alive
        self._pages = {
            "/": self._page,
            "/metrics": self._metrics,
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/freshz": self._freshz,
            "/statusz": self._statusz,
        }

    def answer(self, request: Request) -> Answer:
        """The page that ``request`` names."""
        page = self._pages.get(request.path)
        if page is None:
            return text_answer(HTTPStatus.NOT_FOUND, f"Nothing here. Try {', '.join(self._pages)}.\n")
        answer = page(request)
        failed = precondition(request.headers) if answer.status is HTTPStatus.OK else None
        return answer if failed is None else failed

    @cached_property
    def _registry(self) -> CollectorRegistry:
        from definition_server.observability.metrics import create_registry

        return create_registry(self._read)

    def _metrics(self, request: Request) -> Answer:
        # Imported here, as the modules of the other pages are: most of these imports take long, and must not delay the
        # start of workers.
        from definition_server.observability.exposition import expose

        names = parse_qs(request.query).get("name[]", [])
        headers, body = expose(
            self._registry, request.headers.get("accept", ""), request.headers.get("accept-encoding", ""), names
        )
        return Answer(HTTPStatus.OK, body, tuple(headers))

    def _livez(self, _: Request) -> Answer:
        problem = self._alive()
        if problem is None:
            return text_answer(HTTPStatus.OK, "alive\n")
        return text_answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{problem}\n")

    def _readyz(self, _: Request) -> Answer:
        status = self._read()
        if status.ready:
            return text_answer(HTTPStatus.OK, "ready\n")
        reason = "shutting down" if status.stopping else "no worker serves a catalogue yet"
        if status.full and not status.stopping:
            reason = "every worker holds MAX_CONNECTIONS clients"
        if status.sync.last_error is not None:
            reason += f"; last sync: {status.sync.last_error}"
        return text_answer(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {reason}\n")

    def _freshz(self, _: Request) -> Answer:
        freshness = self._read().freshness
        if freshness.fresh:
            return text_answer(HTTPStatus.OK, "fresh\n")
        return text_answer(HTTPStatus.SERVICE_UNAVAILABLE, f"stale: {freshness.reason}\n")

    def _page(self, _: Request) -> Answer:
        from definition_server.observability.status_page import page_headers, status_page

        return Answer(HTTPStatus.OK, status_page(self._read(), time.time()), page_headers())

    def _statusz(self, request: Request) -> Answer:
        from definition_server.observability.exposition import prefers_html

        wanted = parse_qs(request.query).get("format")
        if wanted is None and prefers_html(request.headers.get("accept", "")):
            return self._page(request)
        document = json.dumps(shown(asdict(self._read())), indent=2)
        return Answer(
            HTTPStatus.OK, f"{document}\n".encode(), (("Content-Type", "application/json"), ("Vary", "Accept"))
        )
