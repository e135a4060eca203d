"""The example of ``docs/engine-api.md`` runs as it is printed there, and a stock grpcio client can call it."""

from __future__ import annotations

import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

PAGE = Path(__file__).parents[3] / "docs" / "engine-api.md"
STARTED_SECONDS = 30.0
CALL_SECONDS = 20.0


def example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", example()], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], STARTED_SECONDS)[0], "the example does not start"
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def greet(port: int, method: str, name: str) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(
            f"/demo.Greeter/{method}",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
        )
        reply: StringValue = call(StringValue(value=name), timeout=CALL_SECONDS)
        return str(reply.value)


def test_the_example_has_about_twenty_lines_of_statements() -> None:
    lines = [line for line in example().splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 20


def test_the_static_method_of_the_example_answers(port: int) -> None:
    assert greet(port, "Motto", "anybody") == "Hello, everybody"


def test_the_handler_of_the_example_answers(port: int) -> None:
    assert greet(port, "SayHello", "Ada") == "Hello, Ada"


def test_the_handler_of_the_example_refuses_a_call_without_a_name(port: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        greet(port, "SayHello", "")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "a greeting needs a name"
