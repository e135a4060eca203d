"""The code that is mutated, and the tests that must detect the faults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Room:
    """A part of the code, and its tests."""

    name: str
    folders: tuple[str, ...]
    """Below ``service/``."""
    tests: tuple[str, ...]

    def modules(self, tree: Path) -> list[Path]:
        """The modules of the room, as paths relative to ``tree``."""
        found = (path for folder in self.folders for path in (tree / "service" / folder).rglob("*.py"))
        return sorted(path.relative_to(tree) for path in found if path.name != "__init__.py")


def mirror(module: Path) -> str:
    """The beginning of the ids of the tests of ``module`` (below ``service/``)."""
    return str(Path("tests/unit") / module.relative_to("service").parent / f"test_{module.stem}")


def limits_of(module: Path) -> str:
    """The test file that states the limits of the modules in the folder of ``module``, if there is one."""
    return str(Path("tests/unit") / module.relative_to("service").parent / "test_limits.py")


_PROCESSES = ("tests/unit/definition_server", "tests/integration")
ROOMS = (
    Room("catalog", ("definition_server/catalog",), _PROCESSES),
    Room("ipc", ("definition_server/ipc",), _PROCESSES),
    Room("control_plane", ("definition_server/control_plane",), _PROCESSES),
    Room("data_plane", ("definition_server/data_plane",), _PROCESSES),
    Room("grpc_h2", ("grpc_h2",), ("tests/unit/grpc_h2", "tests/fuzz", "tests/simulation",
                                   "tests/unit/definition_server/data_plane")),
)  # fmt: skip
