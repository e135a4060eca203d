"""``python -m tests.mutants.zygote``: runs pytest many times, each time in a fork of one process.

Three quarters of the time of a short pytest run are the imports of libraries. This process has imported these
libraries, but no module of the project: each fork imports the modules in their present state.

It reads one JSON list of pytest's arguments a line, and answers with the process id of the fork, then with its exit
code (negative: the signal that ended it).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from contextlib import suppress

import pytest

_LIBRARIES = (
    "asyncio", "concurrent.futures", "cryptography.x509", "google.protobuf.json_format", "grpc", "grpc.aio",
    "grpc_health.v1.health", "grpc_reflection.v1alpha.reflection", "h2.connection", "http.client", "hypothesis",
    "hypothesis.strategies", "hypothesis.stateful", "prometheus_client", "prometheus_client.parser", "psycopg",
    "pydantic", "rich.console", "ssl", "structlog", "testcontainers.postgres", "unittest.mock", "uvloop",
)  # fmt: skip
"""What the tests import. A library that is missing here is imported by each fork."""


def main() -> None:
    """Serve until stdin ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LIBRARIES:
            with suppress(ImportError):
                importlib.import_module(name)
    assert not any(name.partition(".")[0] in ("definition_server", "grpc_h2") for name in sys.modules)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(json.loads(line))
        print(json.dumps(child), flush=True)  # noqa: T201 - the answer
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)  # noqa: T201 - and its end


def _run(arguments: list[str]) -> None:
    code = 3
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        code = int(pytest.main(arguments))
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
