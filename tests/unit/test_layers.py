"""The rooms of ``ARCHITECTURE.md`` hold: a room imports only rooms below it, never its neighbour on the same floor, and
no modules import each other in a circle; psycopg, gRPC and the environment are each touched only where the architecture
says; the catalogue knows no process, no socket and no database. All of it is read from the sources, imports inside
functions included. The second half proves that the reader itself sees what is forbidden.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import definition_server

PACKAGE = "definition_server"

FLOORS = {
    "cli": 4,
    "control_plane": 3,
    "data_plane": 3,
    "ipc": 2,
    "observability": 2,
    "catalog": 1,
    "settings": 0,
    "rpc": 0,
}

ROOM_OF_MODULE = {"": "settings", "cpus": "settings", "environment": "settings", "__main__": "cli"}
"""Modules beside the rooms. The package itself holds only the version."""

ONLY_IN = {
    "psycopg": ("control_plane/postgres.py",),
    "grpc": (
        "data_plane/transports/grpcio.py",
        "data_plane/transports/native.py",
        "data_plane/transports/first_calls.py",
        "data_plane/health.py",
        "cli/channel.py",
        "cli/client.py",
        "rpc/",
    ),
}
"""Top-level package, its relatives included (``grpc_health``, ``psycopg_pool``) → where alone it is imported."""

NOT_IN: dict[str, tuple[str, ...]] = {
    # "No process, no socket, no database."
    "catalog": ("asyncio", "multiprocessing", "selectors", "signal", "socket", "subprocess", "threading", "psycopg"),
}

NATIVE = "data_plane/transports/native.py"
"""It takes the servicers of health and reflection as they are, and no gRPC but our own carries them."""

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
ENVIRONMENT_HOME = "environment.py"


@dataclass(frozen=True)
class Arrow:
    """One import: from a module to a module."""

    source: str
    target: str
    deferred: bool
    """Inside a function: it runs when that is called."""


class Sources:
    """Modules by their path below the package, as ``catalog/wire.py``."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.trees = {path: ast.parse(text, path) for path, text in texts.items()}
        self.modules = {module_of(path) for path in texts}
        self._packages = {module.rsplit(".", depth)[0] for module in self.modules for depth in range(1, 4)}

    def arrows(self, path: str) -> Iterator[Arrow]:
        """Every import of one module; what is imported *from* a package is a module where there is one by that name."""
        source, tree = module_of(path), self.trees[path]
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            for target in self._targets(path, node):
                yield Arrow(source, target, id(node) in inside)

    def _targets(self, path: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = f"{PACKAGE}/{path}".split("/")[: -node.level]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in self.modules | self._packages else base


def module_of(path: str) -> str:
    """``catalog/wire.py`` → ``definition_server.catalog.wire``."""
    return ".".join([PACKAGE, *path.removesuffix(".py").removesuffix("__init__").strip("/").split("/")]).rstrip(".")


def room_of(module: str) -> str:
    """The room a module of ours lies in."""
    first = module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]
    return ROOM_OF_MODULE.get(first, first)


def below(module: str, names: tuple[str, ...]) -> bool:
    """Whether ``module`` is one of ``names``, inside one, or a relative of one."""
    return any(module == name or module.startswith((f"{name}.", f"{name}_")) for name in names)


def violations(sources: Sources) -> list[str]:
    """Everything that the architecture forbids, one line each."""
    found = []
    for path in sources.trees:
        for arrow in sources.arrows(path):
            found += [f"{path}: {why}" for why in forbidden(path, arrow)]
        if path != ENVIRONMENT_HOME and reads_environment(sources.trees[path]):
            found.append(f"{path}: reads the environment")
    return found + cycles(sources)


def forbidden(path: str, arrow: Arrow) -> Iterator[str]:
    room = room_of(arrow.source)
    if room not in FLOORS:
        yield f"no floor is known for the room {room}"
    elif arrow.target.startswith(f"{PACKAGE}."):
        other = room_of(arrow.target)
        if other not in FLOORS or (other != room and FLOORS[other] >= FLOORS[room]):
            yield f"{room} may not know {arrow.target}"
    if below(arrow.target, NOT_IN.get(room, ())):
        yield f"{room} may not know {arrow.target}"
    if path == NATIVE and (arrow.target == "grpc" or arrow.target.startswith("grpc.")):
        yield f"{arrow.target} belongs in another transport"
    for name, homes in ONLY_IN.items():
        if below(arrow.target, (name,)) and not path.startswith(homes):
            yield f"{arrow.target} belongs in {', '.join(homes)}"


def reads_environment(tree: ast.AST) -> bool:
    """Whether ``os.environ`` or one of its relatives is named, by attribute or by import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT:
            return True
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "posix"):
            names = {alias.name for alias in node.names}
            if names & (ENVIRONMENT | {"*"}):
                return True
    return False


def cycles(sources: Sources) -> list[str]:
    """The first circle of imports, if any.

    A package may choose among its own modules when it is asked to (``data_plane.transports`` does): a deferred import
    from a package into itself is no part of a circle. Any other deferred import is, because a circle that works only
    while nobody calls too early is still one.
    """
    graph: dict[str, set[str]] = {}
    for path in sources.trees:
        arrows = [arrow for arrow in sources.arrows(path) if arrow.target in sources.modules]
        chosen = (
            arrow.target
            for arrow in arrows
            if arrow.target != arrow.source
            and not (arrow.deferred and path.endswith("__init__.py") and below(arrow.target, (arrow.source,)))
        )
        graph[module_of(path)] = set(chosen)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"circle: {' → '.join(error.args[1])}"]
    return []


@pytest.fixture(scope="module")
def sources() -> Sources:
    root = Path(definition_server.__file__).parent
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    return Sources(texts)


def test_no_module_imports_what_the_architecture_forbids(sources: Sources) -> None:
    assert violations(sources) == []


def test_the_sources_are_really_read(sources: Sources) -> None:
    """A reader that finds nothing forbidden because it finds nothing at all proves nothing."""
    arrows = {(arrow.source, arrow.target) for path in sources.trees for arrow in sources.arrows(path)}
    assert len(sources.trees) > 40
    assert (f"{PACKAGE}.catalog.definition", f"{PACKAGE}.catalog.wire") in arrows
    assert (f"{PACKAGE}.control_plane.postgres", "psycopg") in arrows
    assert (f"{PACKAGE}.data_plane.transports.grpcio", "grpc") in arrows
    assert reads_environment(sources.trees["environment.py"])


def test_every_folder_of_the_package_is_a_room_with_a_floor(sources: Sources) -> None:
    assert {room_of(module) for module in sources.modules} <= FLOORS.keys()


FORBIDDEN = {
    "upwards": ("catalog/x.py", "import definition_server.ipc.memory"),
    "upwards by a name": ("ipc/x.py", "from definition_server.control_plane.master import run_master"),
    "upwards by a module": ("observability/x.py", "from definition_server import data_plane"),
    "upwards into main": ("control_plane/x.py", "import definition_server.__main__"),
    "upwards from floor 0": ("cpus.py", "from definition_server.catalog import wire"),
    "upwards relatively": ("catalog/x.py", "from ..ipc import memory"),
    "upwards relatively, the package": ("catalog/x.py", "from .. import ipc"),
    "upwards in a function": ("catalog/x.py", "def f():\n    import definition_server.ipc.stats"),
    "upwards in a method": ("catalog/x.py", "class C:\n    async def f(self):\n        import definition_server.ipc"),
    "upwards for types": ("catalog/x.py", "if TYPE_CHECKING:\n    from definition_server.ipc import stats"),
    "upwards among others": ("catalog/x.py", "import json, definition_server.ipc"),
    "upwards under another name": ("catalog/x.py", "import definition_server.ipc as below"),
    "neighbours, control and data plane": ("control_plane/x.py", "import definition_server.data_plane.worker"),
    "neighbours, data and control plane": ("data_plane/x.py", "from definition_server import control_plane"),
    "neighbours, ipc and observability": ("ipc/x.py", "from definition_server.observability import logs"),
    "neighbours, observability and ipc": ("observability/x.py", "from definition_server.ipc import stats"),
    "neighbours, settings and rpc": ("settings.py", "import definition_server.rpc"),
    "a room without a floor": ("utils/x.py", "import json"),
    "a room without a floor, imported": ("cli/x.py", "import definition_server.utils"),
    "psycopg beside its home": ("control_plane/sync.py", "import psycopg"),
    "psycopg's relatives": ("cli/x.py", "from psycopg_pool import ConnectionPool"),
    "psycopg's parts": ("control_plane/x.py", "from psycopg.types.string import ByteaBinaryLoader"),
    "grpc in a service": ("data_plane/services.py", "import grpc"),
    "grpc.aio in a service": ("data_plane/services.py", "from grpc.aio import server"),
    "grpc in the native transport": (NATIVE, "import grpc"),
    "grpc.aio in the native transport": (NATIVE, "from grpc.aio import server"),
    "health beside its home": ("control_plane/x.py", "from grpc_health.v1 import health_pb2"),
    "reflection beside its home": ("data_plane/worker.py", "from grpc_reflection.v1alpha import reflection"),
    "a socket in the catalogue": ("catalog/x.py", "import socket"),
    "a process in the catalogue": ("catalog/x.py", "def f():\n    from subprocess import run"),
    "the environment in the declaration": ("settings.py", "import os\nos.environ"),
    "the environment by attribute": ("cli/x.py", "import os\nos.environ.get('PORT')"),
    "the environment by alias": ("cli/x.py", "import os as system\nsystem.getenv('PORT')"),
    "the environment by name": ("cli/x.py", "from os import environ"),
    "the environment by star": ("cli/x.py", "from os import *"),
}


@pytest.mark.parametrize(("path", "text"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_forbidden_arrow_is_found(path: str, text: str) -> None:
    others = {"ipc/memory.py": "", "data_plane/__init__.py": "", "control_plane/master.py": ""}
    found = violations(Sources({**others, path: text}))
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")


ALLOWED = {
    "everything from the top": ("cli/x.py", "from definition_server.control_plane.master import run_master"),
    "the catalogue from the planes": ("data_plane/x.py", "from definition_server.catalog.snapshot import Snapshot"),
    "two floors down": ("control_plane/x.py", "from definition_server.settings import Settings"),
    "within a room": ("ipc/x.py", "from . import messages\nfrom definition_server.ipc.stats import Slot"),
    "the version": ("control_plane/x.py", "from definition_server import __version__"),
    "settings know the CPUs": ("settings.py", "from definition_server.cpus import granted_cpus"),
    "the environment at home": ("environment.py", "import os\nos.environ"),
    "psycopg at home": ("control_plane/postgres.py", "import psycopg"),
    "health in the native transport": (NATIVE, "from grpc_health.v1 import health_pb2_grpc"),
    "grpc at home": ("rpc/avap_pb2_grpc.py", "import grpc"),
    "other names that begin alike": ("cli/x.py", "import grpclike, psycopgish\nfrom os import cpu_count"),
}


@pytest.mark.parametrize(("path", "text"), ALLOWED.values(), ids=ALLOWED)
def test_an_allowed_arrow_is_let_pass(path: str, text: str) -> None:
    assert violations(Sources({path: text})) == []


def test_a_circle_is_found_however_long() -> None:
    texts = {
        "catalog/a.py": "from definition_server.catalog import b",
        "catalog/b.py": "from definition_server.catalog.c import thing",
        "catalog/c.py": "def f():\n    import definition_server.catalog.a",
    }
    assert len(violations(Sources(texts))) == 1
    assert "circle" in violations(Sources(texts))[0]


def test_a_package_may_choose_among_its_own_modules_later() -> None:
    inside = "from definition_server.data_plane.transports import CannotListen"
    later = "def create():\n    from definition_server.data_plane.transports.grpcio import GrpcioTransport"
    at_once = "from definition_server.data_plane.transports.grpcio import GrpcioTransport"
    home = "data_plane/transports/__init__.py"
    assert violations(Sources({home: later, "data_plane/transports/grpcio.py": inside})) == []
    assert violations(Sources({home: at_once, "data_plane/transports/grpcio.py": inside})) != []
