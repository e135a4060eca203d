"""The gRPC stacks that the project compares itself with: their requirements, build and start."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.support.builds import built, make, place, run

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("PEERS_CACHE") or Path.home() / ".cache" / "definition-server-peers")
Tools = dict[str, str]
"""Program → how to install it."""
_VERSION = re.compile(r"\d+\.\d+[\w.+-]*")


class Build(ABC):
    """A program that is built from the sources in ``source``."""

    not_built = "not built: run `nox -s peers`"

    def __init__(self, name: str, source: Path, builds: Tools, runs: Tools, also: Sequence[Path] = ()) -> None:
        """``builds`` and ``runs``: programs that are needed to build and to start it; ``also``: see `place`."""
        self.name = name
        self.source = source
        self._builds, self._runs, self._also = builds, runs, also

    @property
    def cache(self) -> Path:
        """The folder in which its builds are stored."""
        return CACHE

    @property
    def missing_tools(self) -> str:
        """The missing programs that building needs; empty if none is missing."""
        return _lacking(self._builds | self._runs)

    @property
    def missing(self) -> str:
        """The reason why the peer cannot be started; empty if it can be started."""
        if self.place.exists():
            return _lacking(self._runs)
        return self.missing_tools or self.not_built

    @property
    def place(self) -> Path:
        """The directory of its build."""
        return place(self.source, self.cache, self._also)

    def build(self) -> Path:
        """Build the program unless it is built already. Returns the directory of the build.

        Raises:
            BuildFailed: with the output of the compiler or the package manager.
        """
        return built(self.source, self.cache, self._fill, self._also)

    @abstractmethod
    def _fill(self, out: Path) -> None:
        """Build into ``out``."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of its components, for a record."""


class Stack(Build):
    """A stack whose server is a program in ``folder``."""

    def __init__(self, name: str, folder: str, builds: Tools, runs: Tools) -> None:
        """``builds`` and ``runs``: programs that are needed to build and to start it."""
        super().__init__(name, HERE / folder, builds, runs)

    @abstractmethod
    def command(self) -> list[str]:
        """The command line that starts it once it is built."""


class GrpcJs(Stack):
    """npm's grpc-js."""

    def _fill(self, out: Path) -> None:
        shutil.copytree(self.source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
        make(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], out)

    def command(self) -> list[str]:
        """The command line of a script."""
        return ["node", str(self.place / "server.js")]

    def versions(self) -> dict[str, str]:
        """Versions of the stack, from the lock file, and of the installed node."""
        locked = json.loads((self.source / "package-lock.json").read_text())["packages"]
        return {"grpc-js": locked["node_modules/@grpc/grpc-js"]["version"], **tool_version("node", "--version")}


class GrpcGo(Stack):
    """grpc-go, with the compiler's default optimization."""

    def _fill(self, out: Path) -> None:
        make(["go", "build", "-buildvcs=false", "-o", str(out / "peer"), "."], self.source)

    def command(self) -> list[str]:
        """The command line of a binary."""
        return [str(self.place / "peer")]

    def versions(self) -> dict[str, str]:
        """Versions of the stack, from ``go.mod``, and of the installed compiler."""
        pinned = re.search(r"google.golang.org/grpc v(\S+)", (self.source / "go.mod").read_text())
        return {"grpc-go": pinned[1] if pinned else "", **tool_version("go", "version")}


class Tonic(Stack):
    """Rust's tonic, a release build."""

    def _fill(self, out: Path) -> None:
        target = out / "target"
        make(["cargo", "build", "-q", "--release", "--locked", "--target-dir", str(target)], self.source)
        (target / "release" / "peer").rename(out / "peer")
        shutil.rmtree(target)

    def command(self) -> list[str]:
        """The command line of a binary."""
        return [str(self.place / "peer")]

    def versions(self) -> dict[str, str]:
        """Versions of the stack, from the lock file, and of the installed compiler."""
        locked = tomllib.loads((self.source / "Cargo.lock").read_text())["package"]
        found = {package["name"]: package["version"] for package in locked}
        return {"tonic": found["tonic"], **tool_version("rustc", "--version")}


class Grpcio(Stack):
    """grpcio, on which the project depends: nothing is built."""

    def __init__(self, name: str, *arguments: str) -> None:
        super().__init__(name, "grpcio", {}, {})
        self._arguments = arguments

    @property
    def missing(self) -> str:
        """Empty, because it is always installed."""
        return ""

    def build(self) -> Path:
        """No effect, because grpcio is installed as a package."""
        return self.source

    def _fill(self, out: Path) -> None:
        """No effect, because grpcio is installed as a package."""

    def command(self) -> list[str]:
        """This Python."""
        return [sys.executable, str(self.source / "server.py"), *self._arguments]

    def versions(self) -> dict[str, str]:
        """Versions of the installed packages."""
        return {"grpcio": version("grpcio"), "python": ".".join(map(str, sys.version_info[:3]))}


def _lacking(tools: Tools) -> str:
    """A text that names those of ``tools`` that are missing; empty if none is missing."""
    lacking = [f"{tool} ({package})" for tool, package in tools.items() if shutil.which(tool) is None]
    return f"missing on this machine: {', '.join(lacking)}" if lacking else ""


def tool_version(tool: str, argument: str) -> dict[str, str]:
    """The version of an installed program; empty if it is missing."""
    try:
        printed = run([tool, argument], seconds=30)
        found = _VERSION.search(printed.stdout or printed.stderr)  # nginx prints its version as an error
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {tool: found[0]} if found else {}


STACKS: dict[str, Stack] = {
    stack.name: stack
    for stack in (
        GrpcJs("grpc-js", "grpc_js", {"npm": "Debian npm"}, {"node": "Debian nodejs"}),
        GrpcGo("grpc-go", "grpc_go", {"go": "Go 1.26 or newer"}, {}),
        Tonic("tonic", "tonic", {"cargo": "Rust 1.88 or newer"}, {}),
        Grpcio("grpcio-aio", "--aio"),
        Grpcio("grpcio-sync"),
    )
}
