"""The project obeys the rules of `layer_rules`, and each rule finds its violations."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.layer_rules import (
    FLOORS,
    LONG_FUNCTIONS,
    NATIVE,
    NOT_YET,
    Sources,
    inside,
    long_functions,
    reads_environment,
    room_of,
    violations,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources() -> Sources:
    roots = {"definition_server": "service", "grpc_h2": "service", "tests": ".", "perf": "."}
    return Sources(
        {
            path.relative_to(ROOT / folder).as_posix(): path.read_text(encoding="utf-8")
            for package, folder in roots.items()
            for path in sorted((ROOT / folder / package).rglob("*.py"))
            if "node_modules" not in path.parts
        }
    )


def test_no_module_has_an_import_that_the_architecture_forbids(sources: Sources) -> None:
    assert [line for line in violations(sources) if line not in NOT_YET] == []


def test_each_excused_violation_still_exists(sources: Sources) -> None:
    """An entry of `NOT_YET` without a violation must be removed."""
    assert sorted(NOT_YET - set(violations(sources))) == []


def test_imports_are_found_in_every_part_of_the_sources(sources: Sources) -> None:
    """If no import were read, no violation would be found."""
    arrows = {(arrow.source, arrow.target) for path in sources.trees for arrow in sources.arrows(path)}
    for package, least in {"definition_server": 60, "grpc_h2": 25, "tests": 100, "perf": 45}.items():
        assert sum(path.startswith(f"{package}/") for path in sources.trees) > least
    assert ("definition_server.catalog.definition", "definition_server.catalog.wire") in arrows
    assert ("definition_server.control_plane.postgres", "psycopg") in arrows
    assert ("definition_server.data_plane.transports.grpcio", "grpc") in arrows
    assert ("definition_server.data_plane.transports.native", "grpc_h2") in arrows
    assert ("perf.harness.measure", "perf.generator.run") in arrows
    assert ("perf.harness.memory", "tests.support.table") in arrows
    assert {"Server", "Connection", "Limits", "TlsCredentials"} <= sources.exported
    assert reads_environment(sources.trees["definition_server/environment.py"])


def test_a_function_is_longer_than_50_lines_only_for_a_reason_of_speed(sources: Sources) -> None:
    assert sorted(long_functions(sources)) == sorted(LONG_FUNCTIONS)


def test_a_function_of_51_lines_is_found_and_one_of_50_is_not() -> None:
    body = "    x = 1\n"
    text = f'class A:\n  def long(self):\n    """One line\n    more."""\n{body * 51}\ndef short():\n{body * 50}'
    assert list(long_functions(Sources({"grpc_h2/x.py": text, "perf/x.py": text}))) == [("grpc_h2/x.py", "long")]


def test_every_folder_of_a_package_is_a_room_with_a_floor(sources: Sources) -> None:
    for package, floors in FLOORS.items():
        rooms = {room_of(module) for module in sources.modules if inside(module, package)}
        assert rooms <= floors.keys(), package


OTHERS = {
    "definition_server/ipc/memory.py": "",
    "definition_server/data_plane/__init__.py": "",
    "definition_server/control_plane/master.py": "",
    "definition_server/settings.py": "",
    "grpc_h2/__init__.py": '__all__ = ["Server", "frames"]',
    "grpc_h2/aio/server.py": "",
    "grpc_h2/connection/connection.py": "",
    "grpc_h2/rpc/status.py": "",
    "grpc_h2/static/routes.py": "",
    "grpc_h2/wire/frames.py": "",
    "perf/benches/native.py": "",
    "perf/generator/run.py": "",
    "perf/harness/sla.py": "",
    "perf/peers/__init__.py": "",
    "perf/report/page.py": "",
    "perf/targets/target.py": "",
    "tests/conftest.py": "",
    "tests/chaos/soak.py": "",
    "tests/support/wire.py": "",
    "tests/unit/perf/harness/test_sla.py": "",
}
"""Modules that the examples import. None of them breaks a rule."""

DS = "definition_server"
FORBIDDEN = {
    "upwards": (f"{DS}/catalog/x.py", "import definition_server.ipc.memory"),
    "upwards by a name": (f"{DS}/ipc/x.py", "from definition_server.control_plane.master import run_master"),
    "upwards by a module": (f"{DS}/observability/x.py", "from definition_server import data_plane"),
    "upwards into main": (f"{DS}/control_plane/x.py", "import definition_server.__main__"),
    "upwards from floor 0": (f"{DS}/cpus.py", "from definition_server.catalog import wire"),
    "upwards relatively": (f"{DS}/catalog/x.py", "from ..ipc import memory"),
    "upwards relatively, the package": (f"{DS}/catalog/x.py", "from .. import ipc"),
    "upwards in a function": (f"{DS}/catalog/x.py", "def f():\n    import definition_server.ipc.stats"),
    "upwards in a method": (
        f"{DS}/catalog/x.py",
        "class C:\n    async def f(self):\n        import definition_server.ipc",
    ),
    "upwards for types": (f"{DS}/catalog/x.py", "if TYPE_CHECKING:\n    from definition_server.ipc import stats"),
    "upwards among others": (f"{DS}/catalog/x.py", "import json, definition_server.ipc"),
    "upwards under another name": (f"{DS}/catalog/x.py", "import definition_server.ipc as below"),
    "neighbours, control and data plane": (f"{DS}/control_plane/x.py", "import definition_server.data_plane.worker"),
    "neighbours, data and control plane": (f"{DS}/data_plane/x.py", "from definition_server import control_plane"),
    "neighbours, ipc and observability": (f"{DS}/ipc/x.py", "from definition_server.observability import logs"),
    "neighbours, observability and ipc": (f"{DS}/observability/x.py", "from definition_server.ipc import stats"),
    "neighbours, settings and rpc": (f"{DS}/settings.py", "import definition_server.rpc"),
    "a room without a floor": (f"{DS}/utils/x.py", "import json"),
    "a room without a floor, imported": (f"{DS}/cli/x.py", "import definition_server.utils"),
    "psycopg beside its home": (f"{DS}/control_plane/sync.py", "import psycopg"),
    "psycopg's relatives": (f"{DS}/cli/x.py", "from psycopg_pool import ConnectionPool"),
    "psycopg's parts": (f"{DS}/control_plane/x.py", "from psycopg.types.string import ByteaBinaryLoader"),
    "grpc in a service": (f"{DS}/data_plane/services.py", "import grpc"),
    "grpc.aio in a service": (f"{DS}/data_plane/services.py", "from grpc.aio import server"),
    "grpc in the native transport": (NATIVE, "import grpc"),
    "health's library in the native transport": (NATIVE, "from grpc_health.v1 import health_pb2_grpc"),
    "grpc.aio in the native transport": (NATIVE, "from grpc.aio import server"),
    "health beside its home": (f"{DS}/control_plane/x.py", "from grpc_health.v1 import health_pb2"),
    "reflection beside its home": (f"{DS}/data_plane/worker.py", "from grpc_reflection.v1alpha import reflection"),
    "a socket in the catalogue": (f"{DS}/catalog/x.py", "import socket"),
    "a process in the catalogue": (f"{DS}/catalog/x.py", "def f():\n    from subprocess import run"),
    "the environment in the declaration": (f"{DS}/settings.py", "import os\nos.environ"),
    "the environment by attribute": (f"{DS}/cli/x.py", "import os\nos.environ.get('PORT')"),
    "the environment by alias": (f"{DS}/cli/x.py", "import os as system\nsystem.getenv('PORT')"),
    "the environment by name": (f"{DS}/cli/x.py", "from os import environ"),
    "the environment by star": (f"{DS}/cli/x.py", "from os import *"),
    "tests in the service": (f"{DS}/cli/x.py", "from tests.support import wire"),
    "perf in the service": (f"{DS}/cli/x.py", "def f():\n    import perf.targets.target"),
    "engine: connection and aio": ("grpc_h2/connection/x.py", "from grpc_h2.aio.server import Server"),
    "engine: static and connection": ("grpc_h2/static/x.py", "from grpc_h2.connection import connection"),
    "engine: rpc and static": ("grpc_h2/rpc/x.py", "from ..static.routes import Router"),
    "engine: wire and rpc": ("grpc_h2/wire/x.py", "def f():\n    import grpc_h2.rpc.status"),
    "engine: its own interface": ("grpc_h2/aio/x.py", "from grpc_h2 import Server"),
    "engine: a room without a floor": ("grpc_h2/http3/x.py", "import json"),
    "engine: the service": ("grpc_h2/aio/x.py", "from definition_server.settings import Settings"),
    "engine: the service's version": ("grpc_h2/aio/x.py", "import definition_server"),
    "engine: grpc": ("grpc_h2/aio/x.py", "import grpc"),
    "engine: psycopg": ("grpc_h2/wire/x.py", "import psycopg"),
    "engine: a clock": ("grpc_h2/connection/x.py", "from time import monotonic"),
    "engine: a clock in a function": ("grpc_h2/static/x.py", "def f():\n    import time"),
    "engine: randomness": ("grpc_h2/connection/x.py", "import random"),
    "engine: a socket": ("grpc_h2/wire/x.py", "import socket"),
    "engine: an event loop": ("grpc_h2/rpc/x.py", "import asyncio"),
    "engine: the environment": ("grpc_h2/aio/x.py", "from os import environ"),
    "interface: a module, from the service": (NATIVE, "from grpc_h2.aio.server import Server"),
    "interface: a room, from the service": (NATIVE, "from grpc_h2 import wire"),
    "interface: a name that is not exported": (NATIVE, "from grpc_h2 import StreamTable"),
    "interface: everything": (NATIVE, "from grpc_h2 import *"),
    "interface: a module, from perf": ("perf/harness/x.py", "import grpc_h2.static.routes"),
    "interface: a module, from shared code": ("tests/support/x.py", "from grpc_h2.wire import frames"),
    "interface: a module, from a judge": ("tests/judges/x.py", "from grpc_h2.aio import server"),
    "interface: a module, from another simulation": ("tests/simulation/x.py", "from grpc_h2.aio import server"),
    "interface: a module, from another unit test": (f"tests/unit/{DS}/x.py", "import grpc_h2.wire.frames"),
    "perf: targets and generator": ("perf/targets/x.py", "from perf.generator.run import run"),
    "perf: generator and peers": ("perf/generator/x.py", "from perf import peers"),
    "perf: generator and harness": ("perf/generator/x.py", "def f():\n    from perf.harness import sla"),
    "perf: peers and harness": ("perf/peers/x.py", "import perf.harness.sla"),
    "perf: harness and benches": ("perf/harness/x.py", "from perf.benches.native import hot"),
    "perf: report and benches": ("perf/report/x.py", "from perf.benches import native"),
    "perf: benches and report": ("perf/benches/x.py", "from perf.report.page import page"),
    "perf: a room without a floor": ("perf/tools/x.py", "import json"),
    "perf: a module beside the rooms": ("perf/figures.py", "import json"),
    "perf: a test": ("perf/harness/x.py", "from tests.unit.perf.harness import test_sla"),
    "perf: tests that are not shared": ("perf/benches/x.py", "from tests.chaos.soak import soak"),
    "perf: the tests' fixtures": ("perf/harness/x.py", "from tests.conftest import TRANSPORTS"),
    "shared: perf": ("tests/support/x.py", "from perf.targets.target import Target"),
    "shared: tests": ("tests/support/x.py", "from tests.chaos import soak"),
    "shared: fixtures, in a function": ("tests/support/x.py", "def f():\n    from tests.conftest import TRANSPORTS"),
    "tests: perf in a drill": ("tests/chaos/x.py", "from perf.targets.target import Target"),
    "tests: perf in another unit test": (f"tests/unit/{DS}/x.py", "import perf.harness.sla"),
    "tests: a drill in a unit test": (f"tests/unit/{DS}/x.py", "from tests.chaos.soak import soak"),
    "tests: another folder's unit tests": (f"tests/unit/{DS}/x.py", "from tests.unit.perf.harness import test_sla"),
}


@pytest.mark.parametrize(("path", "text"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_forbidden_import_is_found(path: str, text: str) -> None:
    found = violations(Sources({**OTHERS, path: text}))
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")


ALLOWED = {
    "everything from the top": (f"{DS}/cli/x.py", "from definition_server.control_plane.master import run_master"),
    "the catalogue from the planes": (
        f"{DS}/data_plane/x.py",
        "from definition_server.catalog.snapshot import Snapshot",
    ),
    "two floors down": (f"{DS}/control_plane/x.py", "from definition_server.settings import Settings"),
    "within a room": (f"{DS}/ipc/x.py", "from . import messages\nfrom definition_server.ipc.stats import Slot"),
    "the version": (f"{DS}/control_plane/x.py", "from definition_server import __version__"),
    "settings know the CPUs": (f"{DS}/settings.py", "from definition_server.cpus import granted_cpus"),
    "the environment at home": (f"{DS}/environment.py", "import os\nos.environ"),
    "psycopg at home": (f"{DS}/control_plane/postgres.py", "import psycopg"),
    "grpc at home": (f"{DS}/rpc/avap_pb2_grpc.py", "import grpc"),
    "other names that begin alike": (f"{DS}/cli/x.py", "import grpclike, psycopgish\nfrom os import cpu_count"),
    "engine: downwards": ("grpc_h2/connection/x.py", "from grpc_h2.wire import frames\nimport grpc_h2.static.routes"),
    "engine: within a room": ("grpc_h2/wire/x.py", "from grpc_h2.wire import frames\nfrom . import hpack"),
    "engine: the interface knows all": ("grpc_h2/__init__.py", "from grpc_h2.aio.server import Server"),
    "engine: clock and sockets in aio": (
        "grpc_h2/aio/x.py",
        "import asyncio, random, socket\nfrom time import monotonic",
    ),
    "engine: other names that begin alike": ("grpc_h2/wire/x.py", "import timeit, randomised"),
    "interface: exported names": (NATIVE, "from grpc_h2 import Server, frames"),
    "interface: the package": ("perf/harness/x.py", "import grpc_h2"),
    "interface: inside, from its own unit tests": ("tests/unit/grpc_h2/wire/x.py", "from grpc_h2.wire import frames"),
    "interface: inside, from its simulation": ("tests/simulation/engine/x.py", "from grpc_h2.wire import frames"),
    "perf: downwards": ("perf/harness/x.py", "from perf.generator.run import run\nfrom perf import peers"),
    "perf: within a room": ("perf/benches/x.py", "from perf.benches import native"),
    "perf: what is shared": ("perf/benches/x.py", "from tests.support import wire"),
    "perf: the service": ("perf/targets/x.py", "from definition_server.ipc.memory import map_sealed"),
    "perf: grpc and the environment": ("perf/benches/x.py", "import grpc, os\nos.environ"),
    "shared: the service and itself": (
        "tests/support/x.py",
        "import definition_server.ipc.memory\nfrom tests.support import wire",
    ),
    "shared: the database": ("tests/support/x.py", "import psycopg"),
    "tests: perf in its own tests": ("tests/unit/perf/harness/x.py", "from perf.harness import sla"),
    "tests: perf in a judge of it": ("tests/judges/test_witness.py", "from perf.targets.target import Target"),
    "tests: fixtures in a unit test": (f"tests/unit/{DS}/x.py", "from tests.conftest import TRANSPORTS"),
    "tests: the same folder": ("tests/unit/perf/harness/x.py", "from tests.unit.perf.harness import test_sla"),
    "tests: a drill in a drill": ("tests/chaos/x.py", "from tests.chaos import soak"),
}


@pytest.mark.parametrize(("path", "text"), ALLOWED.values(), ids=ALLOWED)
def test_an_allowed_import_is_not_a_violation(path: str, text: str) -> None:
    assert violations(Sources({**OTHERS, path: text})) == []


def test_a_circle_of_any_length_is_found() -> None:
    texts = {
        f"{DS}/catalog/a.py": "from definition_server.catalog import b",
        f"{DS}/catalog/b.py": "from definition_server.catalog.c import thing",
        f"{DS}/catalog/c.py": "def f():\n    import definition_server.catalog.a",
    }
    assert len(violations(Sources(texts))) == 1
    assert "circle" in violations(Sources(texts))[0]


@pytest.mark.parametrize("folder", ["grpc_h2/connection", "perf/harness", "tests/support"])
def test_a_circle_is_found_in_every_package(folder: str) -> None:
    package = folder.replace("/", ".")
    texts = {f"{folder}/a.py": f"from {package} import b", f"{folder}/b.py": f"import {package}.a"}
    assert len(violations(Sources(texts))) == 1
    assert "circle" in violations(Sources(texts))[0]


def test_a_package_may_import_its_own_modules_in_a_function() -> None:
    inside_it = "from definition_server.data_plane.transports import CannotListen"
    later = "def create():\n    from definition_server.data_plane.transports.grpcio import GrpcioTransport"
    at_once = "from definition_server.data_plane.transports.grpcio import GrpcioTransport"
    home = f"{DS}/data_plane/transports/__init__.py"
    module = f"{DS}/data_plane/transports/grpcio.py"
    assert violations(Sources({home: later, module: inside_it})) == []
    assert violations(Sources({home: at_once, module: inside_it})) != []


def test_an_excuse_without_a_violation_is_found() -> None:
    """`test_each_excused_violation_still_exists` relies on this: a violation is named by exactly one line."""
    line = "grpc_h2/connection/x.py: connection may not know random"
    assert violations(Sources({"grpc_h2/connection/x.py": "import random"})) == [line]
    assert violations(Sources({"grpc_h2/connection/x.py": "import json"})) == []
