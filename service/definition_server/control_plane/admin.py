"""Admin HTTP on ``METRICS_PORT``: ``/metrics``, ``/livez``, ``/readyz``, ``/statusz``.

It runs in threads of its own, so that it answers while the master's event loop is busy, and so that a loop that hangs
is noticed: ``/livez`` checks when the loop last ran.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from definition_server.control_plane.listener import PortInUse, reason_text
from definition_server.observability.metrics import create_registry
from definition_server.observability.status import ServiceStatus

_SOCKET_SECONDS = 10.0
"""Longest time that a client that sends nothing occupies a thread."""

StartResponse = Callable[..., Any]


class AdminServer:
    """The HTTP server and its thread."""

    def __init__(
        self, host: str, port: int, *, read: Callable[[], ServiceStatus], alive: Callable[[], str | None]
    ) -> None:
        """Open the port.

        Args:
            read: Returns the service's present status; called from this server's threads.
            alive: Returns None where the master's event loop runs, else the problem.

        Raises:
            PortInUse: where the port cannot be opened.
        """
        app = _App(read, alive)
        server_class = _ServerV6 if ":" in host else _Server
        try:
            self._server = make_server(host, port, app, server_class, _Handler)
        except OSError as error:
            raise PortInUse(reason_text(host, port, "METRICS_PORT", error)) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="admin-http", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Close the port and end the thread."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _App:
    """WSGI application (PEP 3333)."""

    def __init__(self, read: Callable[[], ServiceStatus], alive: Callable[[], str | None]) -> None:
        self._read = read
        self._alive = alive
        self._metrics = make_wsgi_app(create_registry(read))
        self._routes = {"/livez": self._livez, "/readyz": self._readyz, "/statusz": self._statusz}

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        method = environ.get("REQUEST_METHOD")
        if method not in ("GET", "HEAD"):
            allow = [("Allow", "GET, HEAD")]
            return _answer(start_response, HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD are answered.\n", allow)
        # HEAD is GET without the content (RFC 9110, 9.3.2); prometheus_client's application supports only GET.
        body = self._get(environ | {"REQUEST_METHOD": "GET"}, start_response)
        return body if method == "GET" else []

    def _get(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        route = self._routes.get(path)
        if route is None:
            known = ", ".join(["/metrics", *self._routes])
            return _answer(start_response, HTTPStatus.NOT_FOUND, f"Nothing here. Try {known}.\n")
        return route(start_response)

    def _livez(self, start_response: StartResponse) -> Iterable[bytes]:
        problem = self._alive()
        if problem is None:
            return _answer(start_response, HTTPStatus.OK, "alive\n")
        return _answer(start_response, HTTPStatus.SERVICE_UNAVAILABLE, f"{problem}\n")

    def _readyz(self, start_response: StartResponse) -> Iterable[bytes]:
        status = self._read()
        if status.ready:
            return _answer(start_response, HTTPStatus.OK, "ready\n")
        reason = "shutting down" if status.stopping else "no worker serves a catalogue yet"
        if status.full and not status.stopping:
            reason = "every worker holds MAX_CONNECTIONS clients"
        if status.sync.last_error is not None:
            reason += f"; last sync: {status.sync.last_error}"
        return _answer(start_response, HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {reason}\n")

    def _statusz(self, start_response: StartResponse) -> Iterable[bytes]:
        document = json.dumps(asdict(self._read()), indent=2)
        return _answer(start_response, HTTPStatus.OK, document + "\n", kind="application/json")


def _answer(
    start_response: StartResponse,
    status: HTTPStatus,
    text: str,
    headers: Sequence[tuple[str, str]] = (),
    *,
    kind: str = "text/plain; charset=utf-8",
) -> Iterable[bytes]:
    body = text.encode()
    start_response(
        f"{status.value} {status.phrase}", [("Content-Type", kind), ("Content-Length", str(len(body))), *headers]
    )
    return [body]


class _Server(ThreadingWSGIServer):
    daemon_threads = True
    # An option of socketserver: without it a restart would wait for TIME_WAIT. A second listener is still refused.
    allow_reuse_address = True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, or in this one where no thread can be started: probes must be answered."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            self.process_request_thread(request, client_address)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _SOCKET_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Write no access log: probes and scrapes would fill it."""
