"""docs/ingress.md: each proxy starts with the text of the page, calls pass through it, and the kernel's keepalive timer
runs on its connections to clients and to the server.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.judges.proxies import PROXIES, envoy_program, proxy
from tests.judges.tools import command, may_build
from tests.support.client import Client
from tests.support.pages import blocks
from tests.support.polling import until
from tests.support.table import Table

pytestmark = [may_build, pytest.mark.any_transport]

PAGE = Path(__file__).parents[2] / "docs/ingress.md"
_NGINX = """daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr warn;
events {{ }}
http {{
access_log off;
client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{text}
}}
"""
"""A configuration of nginx with the page's text and the lines around it."""

Start = Callable[[Path, str], Sequence[str]]


def _nginx(folder: Path, text: str) -> Sequence[str]:
    file = folder / "nginx.conf"
    file.write_text(_NGINX.format(folder=folder, text=text), encoding="ascii")
    return command("nginx", "Debian nginx"), "-p", str(folder), "-e", "stderr", "-c", str(file)


def _haproxy(folder: Path, text: str) -> Sequence[str]:
    file = folder / "haproxy.cfg"
    file.write_text(text, encoding="ascii")
    return command("haproxy", "Debian haproxy"), "-db", "-f", str(file)


def _envoy(folder: Path, text: str) -> Sequence[str]:
    file = folder / "envoy.yaml"
    file.write_text(text, encoding="ascii")
    return envoy_program(), "-c", str(file), "--use-dynamic-base-id", "-l", "warn", "--concurrency", "1"


STARTS: dict[str, tuple[str, Start]] = {
    "nginx": ("nginx", _nginx), "haproxy": ("haproxy", _haproxy), "envoy": ("yaml", _envoy),
}  # fmt: skip
"""Proxy → the language of its block on the page, and how to start it."""


def timers(port: int) -> list[str]:
    """``sport`` and ``dport`` of established connections of that port whose keepalive timer runs, on either side."""
    told = subprocess.run(
        [command("ss", "Debian iproute2"), "-Htno", "state", "established", f"( sport = :{port} or dport = :{port} )"],
        capture_output=True, text=True, check=True, timeout=10,
    ).stdout  # fmt: skip
    return [line for line in told.splitlines() if "keepalive" in line]


def test_the_page_has_every_proxy_that_is_tested() -> None:
    assert STARTS.keys() == PROXIES.keys()


@pytest.mark.parametrize("kind", STARTS)
def test_a_proxy_as_documented_serves_and_keeps_its_connections_alive(
    kind: str, table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(5)
    server = start_server(table.url).wait_ready()
    language, start = STARTS[kind]
    [block] = blocks(PAGE, language)

    def documented(folder: Path, port: int, behind: int) -> Sequence[str]:
        text = block.text.replace("50051", str(behind)).replace("8443", str(port))
        assert (str(behind) in text, str(port) in text) == (True, True)
        return start(folder, text)

    with proxy(kind, server.port, tmp_path, documented) as port, Client(port) as client:
        until(lambda: client.health() == "SERVING", "the server answers through the proxy", seconds=20)
        assert [client.get(f"command{n}").name for n in range(5)] == [f"command{n}" for n in range(5)]
        # The proxy's end is examined: its port is the local port on connections to clients, and the port is the remote
        # one on connections to the server.
        for number, column in ((port, 2), (server.port, 3)):
            # The test waits, because the kernel shows the retransmission timer while octets are not acknowledged.
            until(partial(_kept, number, column), f"a keepalive timer in column {column} of port {number}", seconds=10)


def _kept(port: int, column: int) -> bool:
    return any(line.split()[column].endswith(f":{port}") for line in timers(port))
