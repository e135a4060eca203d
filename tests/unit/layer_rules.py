"""The rules of docs/architecture.md for every import in service/, tests/ and perf/. This module also limits the length
of functions in service/, because it reads the same sources.

- `definition_server`: a room imports only rooms below it, never another room on its floor. psycopg, gRPC and the
  environment are each touched only in their own files; the catalogue uses no process, no socket and no database.
- `grpc_h2`: ``aio → connection → static → rpc → wire``, never upward. It does not depend on `definition_server`; below
  ``aio`` there is no clock, no randomness, no socket and no event loop.
- All other code uses `grpc_h2` by the names that its ``__init__.py`` exports. Its own tests may import its modules.
- `perf`: rooms with floors, as above.
- Code that tests and `perf` share is in ``tests/support``, which imports neither. Otherwise `perf` imports no tests,
  and only tests of `perf` import `perf`. A unit test imports ``tests/support`` and its own folder, no other tests.

The rules are checked in the sources, including imports inside functions. `test_layers` applies the rules to the
project, and proves that violations are found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

NOT_YET: frozenset[str] = frozenset()
"""Known violations that will be removed. Each must still be a violation, so that this list only becomes shorter."""

FLOORS: dict[str, dict[str, int]] = {
    "definition_server": {
        "cli": 4, "control_plane": 3, "data_plane": 3, "ipc": 2, "observability": 2, "catalog": 1, "jail": 1,
        "settings": 0, "rpc": 0,
    },
    "grpc_h2": {"interface": 6, "aio": 5, "connection": 4, "static": 3, "rpc": 2, "wire": 1},
    "perf": {
        "command": 5, "planning": 4, "benches": 3, "report": 3, "harness": 2, "attackers": 1, "generator": 1,
        "peers": 1, "targets": 0,
    },
}  # fmt: skip
"""Package → room → floor. A room imports itself and rooms on lower floors."""

ROOM_OF_MODULE: dict[str, dict[str, str]] = {
    "definition_server": {
        "": "settings",
        "api_keys": "settings",
        "cpus": "settings",
        "environment": "settings",
        "inherited": "settings",
        "memory_limit": "settings",
        "setting_types": "settings",
        "tls_checks": "settings",
        "__main__": "cli",
    },
    "grpc_h2": {"": "interface"},
    "perf": {"": "targets", "__main__": "command", "commands": "command", "locustfile": "command"},
}
"""Modules beside the rooms. The package `definition_server` itself holds only the version, and `perf` holds nothing."""

ONLY_IN = {
    "psycopg": ("definition_server/control_plane/postgres.py",),
    "grpc": (
        "definition_server/data_plane/transports/grpcio.py",
        "definition_server/data_plane/reflection.py",
        "definition_server/cli/channel.py",
        "definition_server/cli/client.py",
        "definition_server/cli/control_socket.py",
        "definition_server/rpc/",
    ),
}
"""Top-level package, with its relatives (``grpc_health``, ``psycopg_pool``) → the only places where service/ imports
it."""

_INPUT_AND_OUTPUT = ("asyncio", "multiprocessing", "selectors", "signal", "socket", "ssl", "subprocess", "threading")
_CHANCE_AND_TIME = ("time", "random", "secrets", "datetime")

NOT_IN: dict[tuple[str, str], tuple[str, ...]] = {
    # "No process, no socket, no database."
    ("definition_server", "catalog"): (
        "asyncio", "multiprocessing", "selectors", "signal", "socket", "subprocess", "threading", "psycopg",
    ),
    # Sans-IO: time and jitter are arguments.
    **{
        ("grpc_h2", room): _INPUT_AND_OUTPUT + _CHANCE_AND_TIME for room in ("connection", "static", "rpc", "wire")
    },
}  # fmt: skip

NATIVE = "definition_server/data_plane/transports/native.py"
"""It uses the servicers of health and reflection unchanged, and serves them on our own gRPC only."""

MOST_LINES = 50
LONG_FUNCTIONS = {
    (
        "grpc_h2/connection/fast_path.py",
        "answer_batch",
    ): "runs for every known request, in one loop",
    ("grpc_h2/connection/inbound.py", "work"): "runs for every frame that the fast path leaves; its state is in locals",
    ("grpc_h2/rpc/requests.py", "interpret"): "runs for every header list that is not remembered, such as one with a "
    "fresh deadline; one pass over the fields with local names",
    ("grpc_h2/wire/hpack.py", "decode_some"): "runs for every field of a header block that is not remembered",
}
"""Functions whose statements take more than `MOST_LINES` lines, and why they are not divided."""

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
ENVIRONMENT_HOME = "definition_server/environment.py"

SERVICE = ("definition_server", "grpc_h2")
SHARED = "tests.support"
INSIDE_THE_ENGINE = ("tests.unit.grpc_h2", "tests.simulation.engine")
"""Tests of the engine itself, which may import any of its modules."""
TESTS_OF_PERF = (
    "tests.unit.perf", "tests.judges.test_peers", "tests.judges.test_report_page", "tests.judges.test_witness",
)  # fmt: skip
"""The only tests that import `perf`. Three of them are judges, because they need programs of other projects."""


@dataclass(frozen=True)
class Arrow:
    """One import: from a module to a module."""

    source: str
    target: str
    name: str
    """The name that is imported from ``target``; empty where the module itself is imported."""
    deferred: bool
    """Whether the import is inside a function, so that it runs when the function is called."""


class Sources:
    """Modules by their path, as ``definition_server/catalog/wire.py`` or ``perf/commands.py``."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.trees = {path: ast.parse(text, path) for path, text in texts.items()}
        self.modules = {module_of(path) for path in texts}
        above = {
            ".".join(parts[:depth])
            for parts in (module.split(".") for module in self.modules)
            for depth in range(1, len(parts))
        }
        self._modules_and_packages = self.modules | above
        self._arrows: dict[str, list[Arrow]] = {}

    @property
    def exported(self) -> frozenset[str]:
        """The names in ``__all__`` of `grpc_h2`."""
        tree = self.trees.get("grpc_h2/__init__.py")
        for node in tree.body if tree else ():
            if isinstance(node, ast.Assign) and [ast.unparse(each) for each in node.targets] == ["__all__"]:
                return frozenset(ast.literal_eval(node.value))
        return frozenset()

    def arrows(self, path: str) -> list[Arrow]:
        """Every import of one module. A name that is imported *from* a package is a module if there is a module of that
        name."""
        if path not in self._arrows:
            self._arrows[path] = list(self._read(path))
        return self._arrows[path]

    def _read(self, path: str) -> Iterator[Arrow]:
        source = module_of(path)
        waiting: list[tuple[ast.AST, bool]] = [(self.trees[path], False)]
        while waiting:
            node, deferred = waiting.pop()
            for target, name in self._targets(path, node):
                yield Arrow(source, target, name, deferred)
            if not isinstance(node, ast.expr):
                inner = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                waiting.extend((child, inner) for child in ast.iter_child_nodes(node))

    def _targets(self, path: str, node: ast.AST) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = path.split("/")[: -node.level]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full, "") if full in self._modules_and_packages else (base, alias.name)


def module_of(path: str) -> str:
    """``definition_server/catalog/wire.py`` → ``definition_server.catalog.wire``."""
    return path.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")


def room_of(module: str) -> str:
    """The room that a module of a package with rooms lies in."""
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    return ROOM_OF_MODULE[package].get(first, first)


def below(module: str, names: tuple[str, ...]) -> bool:
    """Whether ``module`` is one of ``names``, inside one, or a relative of one."""
    return any(module == name or module.startswith((f"{name}.", f"{name}_")) for name in names)


def inside(module: str, *packages: str) -> bool:
    """Whether ``module`` is one of ``packages`` or in one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def violations(sources: Sources) -> list[str]:
    """Every import that the architecture forbids, one line each."""
    found = []
    for path in sources.trees:
        for arrow in sources.arrows(path):
            found += [f"{path}: {why}" for why in forbidden(path, arrow, sources)]
        if inside(module_of(path), *SERVICE) and path != ENVIRONMENT_HOME and reads_environment(sources.trees[path]):
            found.append(f"{path}: reads the environment")
    return found + cycles(sources)


def forbidden(path: str, arrow: Arrow, sources: Sources) -> Iterator[str]:
    """The reason why ``arrow`` is forbidden; empty if it is allowed."""
    package = path.partition("/")[0]
    if package in FLOORS:
        yield from between_rooms(package, arrow)
    if package in SERVICE:
        yield from of_service(path, arrow)
    else:
        yield from of_tests_and_perf(arrow)
    if package != "grpc_h2" and not inside(arrow.source, *INSIDE_THE_ENGINE):
        yield from past_the_interface(arrow, sources.exported)


def between_rooms(package: str, arrow: Arrow) -> Iterator[str]:
    """Why an import of a room is forbidden: it goes upward, to a neighbour, or to a package that this room may not
    use."""
    floors, room = FLOORS[package], room_of(arrow.source)
    if room not in floors:
        yield f"no floor is known for the room {room}"
    elif arrow.target.startswith(f"{package}.") or (package == "grpc_h2" and arrow.target == package):
        other = room_of(arrow.target)
        if other not in floors or (other != room and floors[other] >= floors[room]):
            yield f"{room} may not know {arrow.target}"
    if below(arrow.target, NOT_IN.get((package, room), ())):
        yield f"{room} may not know {arrow.target}"


def of_service(path: str, arrow: Arrow) -> Iterator[str]:
    """The imports that no module of service/ may make, or only a certain module."""
    if inside(arrow.target, "tests", "perf"):
        yield f"service may not know {arrow.target}"
    if path.startswith("grpc_h2/") and inside(arrow.target, "definition_server"):
        yield f"grpc_h2 may not know {arrow.target}"
    for name, homes in ONLY_IN.items():
        of_ours = inside(arrow.target, "grpc_h2")
        if below(arrow.target, (name,)) and not of_ours and not path.startswith(homes):
            yield f"{arrow.target} belongs in {', '.join(homes)}"


def of_tests_and_perf(arrow: Arrow) -> Iterator[str]:
    """The imports that tests and `perf` may make of each other."""
    source, target = arrow.source, arrow.target
    if inside(source, SHARED):
        if inside(target, "perf", "tests") and not inside(target, SHARED):
            yield f"what tests and perf share may not know {target}"
    elif inside(source, "perf"):
        if inside(target, "tests") and not inside(target, SHARED):
            yield f"perf may not know {target}"
    elif inside(target, "perf") and not inside(source, *TESTS_OF_PERF):
        yield f"only tests of perf may know {target}"
    elif (
        inside(source, "tests.unit")
        and inside(target, "tests")
        and not inside(target, SHARED, "tests.conftest", source.rpartition(".")[0])
    ):
        yield f"a unit test may not know {target}"


def past_the_interface(arrow: Arrow, exported: frozenset[str]) -> Iterator[str]:
    """The names of `grpc_h2` that are used and that its ``__init__.py`` does not export."""
    if arrow.target.startswith("grpc_h2."):
        yield f"{arrow.target} is inside grpc_h2"
    elif arrow.target == "grpc_h2" and arrow.name and arrow.name not in exported:
        yield f"grpc_h2 does not export {arrow.name}"


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
    """The first circle of imports, if any, outside the tests themselves.

    A package may choose among its own modules at run time (``data_plane.transports`` does), so a deferred import from a
    package into itself is not part of a circle. Any other deferred import is part of a circle, even if the circle works
    as long as no function is called too early.
    """
    graph: dict[str, set[str]] = {}
    for path in sources.trees:
        if not inside(module_of(path), *FLOORS, SHARED):
            continue
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


def long_functions(sources: Sources) -> Iterator[tuple[str, str]]:
    """Functions of service/, generated code apart, whose statements without the docstring take more than `MOST_LINES`
    lines."""
    for path, tree in sources.trees.items():
        ours = inside(module_of(path), *SERVICE) and "/rpc/avap_" not in path
        waiting: list[ast.stmt] = [*tree.body] if ours else []
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                statements = node.body[ast.get_docstring(node, clean=False) is not None :]
                if statements and node.body[-1].end_lineno - statements[0].lineno >= MOST_LINES:
                    yield path, node.name
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                waiting += node.body
