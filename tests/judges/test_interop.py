"""gRPC's own interoperability clients pass: the one of Go, and the one of C-core (through Ruby).

The same service on grpcio passes, too, so a failure on only one transport is a fault of that transport.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.judges.tools import go_programs, may_build, ruby_interop, run

pytestmark = may_build

CASE_SECONDS = 60

CASES = (
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "unimplemented_method",
    "unimplemented_service",
    "status_code_and_message",
    "custom_metadata",
)
ONLY_GO = ("special_status_message",)
ONLY_C_CORE = ("client_compressed_unary", "client_compressed_streaming")


@pytest.fixture(scope="session")
def go() -> Path:
    return go_programs() / "interop"


@pytest.fixture(scope="session")
def ruby() -> list[str]:
    return ruby_interop()


@pytest.mark.parametrize("case", CASES + ONLY_GO)
def test_the_interoperability_client_of_go_passes(go: Path, every_transport: int, case: str) -> None:
    done = run([str(go), f"127.0.0.1:{every_transport}", case], seconds=CASE_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", CASES + ONLY_C_CORE)
def test_the_interoperability_client_of_c_core_passes(ruby: list[str], every_transport: int, case: str) -> None:
    address = ["--server_host", "127.0.0.1", "--server_port", str(every_transport), "--use_tls", "false"]
    done = run([*ruby, *address, "--test_case", case], seconds=CASE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert f"OK: {case}" in done.stdout
