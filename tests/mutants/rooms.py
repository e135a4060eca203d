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
    further: tuple[str, ...] = ()
    """Tests beside the mirror of ``folders`` below ``tests/unit``, asked last."""

    def modules(self, tree: Path) -> list[Path]:
        """The modules of the room, as paths relative to ``tree``."""
        found = (path for folder in self.folders for path in (tree / "service" / folder).rglob("*.py"))
        return sorted(path.relative_to(tree) for path in found if path.name != "__init__.py")

    def tests(self, module: Path, tree: Path) -> list[list[str]]:
        """The tests for ``module`` (below ``service/``) in rounds; the next round runs where a fault survives one."""
        folder = Path("tests/unit") / module.relative_to("service").parent
        same = sorted(str(path.relative_to(tree)) for path in (tree / folder).glob(f"test_{module.stem}*.py"))
        rounds = [same] if same else []
        if (tree / folder).is_dir():
            rounds.append([str(folder)])
        return [
            *rounds,
            [*(f"tests/unit/{each}" for each in self.folders if (tree / "tests/unit" / each).is_dir()), *self.further],
        ]


_PROCESSES = ("tests/unit/definition_server", "tests/integration")
ROOMS = (
    Room("catalog", ("definition_server/catalog",), _PROCESSES),
    Room("ipc", ("definition_server/ipc",), _PROCESSES),
    Room("control_plane", ("definition_server/control_plane",), _PROCESSES),
    Room("data_plane", ("definition_server/data_plane",), _PROCESSES),
    Room("grpc_h2", ("grpc_h2",), ("tests/fuzz", "tests/simulation", "tests/unit/definition_server/data_plane")),
)
