"""The modules that a process has imported when it serves. Each module adds CPU time to every start, and memory to the
process."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.environment import inherited_environment
from tests.support.environments import REQUIRED

import definition_server

SOURCES = Path(definition_server.__file__).parents[1]
NOWHERE = ("rich", "structlog.twisted")
SETTINGS = ("pydantic", "pydantic_core")
NOT_IN_A_WORKER = (
    *NOWHERE,
    *SETTINGS,
    "importlib.metadata",
    "click",
    "definition_server.cli",
    "definition_server.control_plane",
    "definition_server.environment",
    "definition_server.settings",
    "google.protobuf",
    "grpc_health.v1",
    "grpc_reflection.v1alpha",
    "h11",
    "prometheus_client",
    "psycopg",
)
NOT_IN_A_NATIVE_WORKER = (*NOT_IN_A_WORKER, "grpc", "pathlib")
NOT_IN_A_MASTER = (
    *NOWHERE,
    "definition_server.control_plane.control_server",
    "definition_server.control_plane.control_service",
    "definition_server.data_plane",
    "definition_server.observability.metrics",
    "definition_server.observability.status_page",
    "google.protobuf",
    "grpc",
    "grpc_h2.aio.listener",
    "grpc_h2.aio.protocol",
    "grpc_h2.aio.server",
    "grpc_h2.connection.connection",
    "grpc_health",
    "prometheus_client",
    "uvloop",
)
NOT_IN_A_CHECKER = (
    "asyncio",
    "ast",
    "dataclasses",
    "inspect",
    "pathlib",
    "structlog",
    "subprocess",
    "definition_server.observability",
    "definition_server.settings",
    "grpc_h2",
)
UNSAFE_READERS = ("marshal", "pickle", "shelve", "dbm", "_pickle")
"""Modules by which octets that are read can run code, or allocate memory without a bound."""


def loaded_by(program: str) -> set[str]:
    """The modules that ``program`` adds to those of a fresh interpreter, to which coverage may belong."""
    shown = f"import sys\nbefore = set(sys.modules)\n{program}\nprint(*(sys.modules.keys() - before))"
    run = subprocess.run([sys.executable, "-P", "-c", shown], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    return set(run.stdout.split())


def found(forbidden: tuple[str, ...], loaded: set[str]) -> list[str]:
    """Those of ``loaded`` that are in ``forbidden``, or in a package of it."""
    return sorted(name for name in loaded if any(name == each or name.startswith(f"{each}.") for each in forbidden))


def worker(**changes: object) -> str:
    """A program with the imports of a worker with this configuration until it is confined."""
    config = {
        "host": "",
        "port": 0,
        "transport": "native",
        "reflection": False,
        "max_connection_age_seconds": 0.0,
        "threadpool_size": 1,
        "app_env": "production",
        "log_level": "INFO",
        "drain_timeout_seconds": 1.0,
    } | changes
    return (
        "import definition_server.data_plane.worker\n"
        "from definition_server.data_plane.preload import preload\n"
        "from definition_server.ipc.messages import Configure\n"
        f"preload(Configure(**{config!r}))"
    )


@pytest.mark.parametrize(("transport", "forbidden"), [("native", NOT_IN_A_NATIVE_WORKER), ("grpcio", NOT_IN_A_WORKER)])
def test_a_worker_imports_only_modules_that_it_uses(transport: str, forbidden: tuple[str, ...]) -> None:
    assert found(forbidden, loaded_by(worker(transport=transport))) == []


def test_a_worker_with_reflection_has_imported_its_libraries_before_it_is_confined() -> None:
    loaded = loaded_by(worker(reflection=True))
    assert {"grpc._utilities", "grpc_reflection.v1alpha.reflection_pb2", "google.protobuf.descriptor_pool"} <= loaded


def test_a_starting_master_imports_only_modules_that_it_uses() -> None:
    program = "import definition_server.cli.main, definition_server.control_plane.master"
    assert found(NOT_IN_A_MASTER, loaded_by(program)) == []


MASTER_STARTS = """
import gc, sys, types

collected = set()

class Master(types.ModuleType):
    def __getattr__(self, name):  # while it is imported
        if name != "run_master":
            raise AttributeError(name)
        collected.add(gc.isenabled())
        return lambda settings: print("serves", collected, gc.isenabled(), gc.get_freeze_count() > there_before)

class Commands:
    def find_spec(self, name, *_):
        if name == "definition_server.cli.main":
            print("commands", gc.isenabled())

sys.modules["definition_server.control_plane.master"] = Master("master")
sys.meta_path.insert(0, Commands())
sys.argv = ["definition-server", "serve"]
there_before = len(gc.get_objects())
from definition_server.cli import run
run()
"""


def test_modules_of_a_master_are_not_examined_by_the_garbage_collector() -> None:
    """They are examined neither while they are imported nor later. Later objects are."""
    command = [sys.executable, "-P", "-c", MASTER_STARTS]
    run = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=inherited_environment() | REQUIRED, check=True, timeout=60
    )
    assert run.stdout.splitlines() == ["commands False", "serves {False} True True"]


def test_a_checker_imports_only_modules_that_it_uses() -> None:
    """A checker starts within a cycle, and at every start of a server."""

    def loaded(program: str) -> set[str]:
        program = f"import sys; sys.path.append(sys.argv[1])\n{program}\nprint(*sys.modules)"
        command = [sys.executable, "-I", "-S", "-c", program, str(SOURCES)]
        return set(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout.split())

    # Since Python 3.14 a NamedTuple imports `ast`.
    of_python = loaded("import typing\nclass Pair(typing.NamedTuple):\n    one: int")
    assert found(NOT_IN_A_CHECKER, loaded("import definition_server.control_plane.checker_process") - of_python) == []


def test_no_module_of_ours_can_read_marshalled_or_pickled_octets() -> None:
    """Bytecode from the table and files on disk are served and checked as octets, and never loaded."""
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & set(UNSAFE_READERS), f"{path}: {names}"
