"""Operators' commands that run beside the server in its container, as ``kubectl exec`` runs them.

``kubectl exec`` starts a process in the namespaces of the container, with its account, capabilities and seccomp filter,
and with the environment of the pod's specification. ``docker exec`` does the same, and the engine's default seccomp
filter is the one that Kubernetes calls ``RuntimeDefault``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.containers.engine import COMMANDS, GRPC
from tests.support.client import Client

from definition_server.cli.exits import Exit

if TYPE_CHECKING:
    from tests.containers.conftest import StartContainer
    from tests.containers.engine import Running
    from tests.support.table import Table

KEPT = "/kept"
"""Not the image's directory, whose mode a tmpfs takes over: an account outside group 0 may not write there."""
PROGRAM = "/opt/venv/bin/definition-server"
ACCOUNTS = {"of the image": "10001:0", "of no group in the image": "65532:65532"}
BARE = ("env", "-i")
"""Removes the whole environment: the server's variables, and those of the image with ``PATH``."""


@pytest.fixture(params=ACCOUNTS.values(), ids=ACCOUNTS)
def server(request: pytest.FixtureRequest, start: StartContainer) -> Running:
    """A server with a read-only root and one writable directory, like a pod with an ``emptyDir``."""
    options = {"tmpfs": {KEPT: "mode=1777"}, "user": request.param}
    running = start(options=options, SNAPSHOT_DIR=KEPT)
    running.wait_log("Control socket open")
    running.wait_log("Definitions Broadcasted")
    return running


def test_operators_commands_work_in_a_confined_container(server: Running, table: Table) -> None:
    served = _json(server, "status")["served"]["version_hash"]
    assert _command(server, "health")[0] == Exit.OK
    table.run("UPDATE obex_dapl_functions SET code = 'new = 1' WHERE name = 'command1'")
    _json(server, "sync")
    changed = _json(server, "status")["served"]["version_hash"]
    assert changed != served
    assert "command1" in _command(server, "diff", served[:8], changed[:8])[1]
    _json(server, "pin", served[:8], "--for", "1h")
    with Client(server.port(GRPC)) as client:
        assert client.sync().version_hash == served
        _json(server, "unpin")
        assert client.sync().version_hash == changed
    _json(server, "roll")
    assert len(server.logged("Worker rolled")) == 2
    assert len(_json(server, "history")["versions"]) == 2
    for command in (("get", "command1"), ("fetch",), ("validate",), ("config",)):
        assert _command(server, *command)[0] == Exit.OK
    assert _command(server, "snapshot", "inspect", f"{KEPT}/last-known-good.avapsnap")[0] == Exit.OK
    assert [line for line in server.lines() if line["level"] not in ("INFO", "WARN")] == []


def test_a_command_of_exec_is_confined_as_the_server_is(server: Running) -> None:
    ours, its = (_status(server, process) for process in ("self", "1"))
    for field in ("Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs"):
        assert ours[field] == its[field], field
    assert int(ours["CapEff"], 16) == 0
    assert ours["NoNewPrivs"] == "1"
    assert ours["Seccomp"] == "2", "the engine's default seccomp filter is not in effect"


def test_a_command_without_the_servers_environment_needs_only_the_socket(server: Running) -> None:
    code, output = _command(server, "status", before=BARE)
    assert code == Exit.CONFIG
    assert "Set SNAPSHOT_DIR or CONTROL_SOCKET as the server has it, or give --socket" in output
    socket = ("--socket", f"{KEPT}/control.sock")
    code, output = _command(server, "status", *socket, "--json", before=BARE)
    assert code == Exit.OK, output
    assert json.loads(output)["served"]["definitions"] == COMMANDS
    assert _command(server, "sync", *socket, before=BARE)[0] == Exit.OK
    code, output = _command(server, "health", before=BARE)
    assert (code, output) == (Exit.OK, "SERVING\n")
    code, output = _command(server, "get", "command1", before=BARE)
    assert code == Exit.CONFIG
    assert "API_KEY" in output
    assert "Traceback" not in output


def _command(server: Running, *words: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
    code, output = server.container.exec_run([*before, PROGRAM, *words])
    return int(code), output.decode()


def _json(server: Running, *words: str) -> Any:
    code, output = _command(server, *words, "--json")
    assert code == Exit.OK, output
    return json.loads(output)


def _status(server: Running, process: str) -> dict[str, str]:
    lines = server.execute("cat", f"/proc/{process}/status").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
