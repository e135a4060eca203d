"""A start makes no query to the name service. With a resolver that does not answer, each query would take half a
minute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.integration.test_cli_whole import Demo
from tests.support.client import Client
from tests.support.families import sample
from tests.support.polling import until
from tests.support.providers import need_provider
from tests.support.table import Table

DEAF = """
import ipaddress, os, sys, time

def _is_name(host):
    if host in (None, "", b"", "0.0.0.0", "::"):
        return False
    try:
        ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:
        return True
    return False

def _audit(event, args):
    if event in ("socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"):
        question = args[0]
    elif event == "socket.getaddrinfo" and _is_name(args[0]):
        question = args[0]
    elif event in ("socket.bind", "socket.connect") and isinstance(args[1], tuple) and _is_name(args[1][0]):
        question = args[1][0]
    else:
        return
    with open({questions!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{event}} {{question}} in {{sys.argv[:3]}}\\n")
    time.sleep(30)

sys.addaudithook(_audit)
"""


@pytest.mark.any_transport
@pytest.mark.parametrize("host", sample(["::", "127.0.0.1", "0.0.0.0"]))
def test_a_start_makes_no_query_to_the_name_service(
    table: Table, start_server: StartServer, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes the workers, because their environment has PYTHONPATH. The URL has the address of the database, not
    a name."""
    questions = tmp_path / "questions"
    (tmp_path / "sitecustomize.py").write_text(DEAF.format(questions=str(questions)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    table.add_commands(1)
    server = start_server(table.url, HOST=host, WORKERS="1")
    server.wait_ready()
    assert server.http("/readyz")[0] == 200
    with Client(server.port) as client:
        assert client.get("command0").name == "command0"
    assert server.metric("avap_cache_size") == 1
    assert not questions.exists(), questions.read_text()


@pytest.mark.thorough  # starts a PostgreSQL
@pytest.mark.transports("native")
def test_the_demo_makes_no_query_to_the_name_service(tmp_path: Path) -> None:
    need_provider("embedded")
    questions = tmp_path / "questions"
    (tmp_path / "sitecustomize.py").write_text(DEAF.format(questions=str(questions)))
    demo = Demo(PORT="0", METRICS_PORT="0", WORKERS="1", PYTHONPATH=str(tmp_path))
    try:
        until(lambda: "Serving" in demo.output, lambda: demo.output)
        assert not questions.exists(), questions.read_text()
        assert demo.interrupt() == 0
        assert not questions.exists(), questions.read_text()
    finally:
        demo.end()


def test_a_query_to_the_name_service_is_detected(tmp_path: Path) -> None:
    questions = tmp_path / "questions"
    text = DEAF.format(questions=str(questions)).replace("time.sleep(30)", "")
    program = "import socket; socket.getfqdn('127.0.0.1'); socket.getaddrinfo('127.0.0.1', 1)"
    subprocess.run([sys.executable, "-c", f"{text}\n{program}"], check=True, timeout=60)
    assert "socket.gethostbyaddr" in questions.read_text()
    assert questions.read_text().count("\n") == 1
