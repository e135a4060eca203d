"""Our own native transport with the compiled engine (docs/engine.md, Two forms), which has to be built like a peer."""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from tests.support.builds import make

from perf.peers import stacks
from perf.targets.target import ROOT

_COMPILER = shlex.split(os.environ.get("CC") or str(sysconfig.get_config_var("CC") or "cc"))[0]
"""As in hatch_build.py."""
_PACKAGES = {"hatchling": "hatchling", "mypyc": "mypy", "setuptools": "setuptools"}
"""Module → package, of the extra ``dev``."""


class CompiledEngine(stacks.Build):
    """The packages of the working tree, with the engine compiled from them: its wheel, unpacked."""

    def __init__(self, name: str) -> None:
        also = (ROOT / "hatch_build.py", ROOT / "pyproject.toml")
        super().__init__(name, ROOT / "service", {_COMPILER: "a C compiler: Debian gcc"}, {}, also)
        self.not_built = f"not built from these sources: run `python -m perf peers build {name}`"

    @property
    def cache(self) -> Path:
        """The directory of the build; each version of Python has another one."""
        return stacks.CACHE / str(sys.implementation.cache_tag)

    @property
    def missing_tools(self) -> str:
        """The compiler, Python's headers, or packages; empty if none is missing."""
        if lacking := super().missing_tools:
            return lacking
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return "missing on this machine: Python's C headers (Debian python3-dev)"
        packages = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
        return f"missing in this environment: {', '.join(packages)} (extra dev)" if packages else ""

    def _fill(self, out: Path) -> None:
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
        make(["env", "COMPILED_ENGINE=required", *build], ROOT)
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(out)
        wheel.unlink()

    def versions(self) -> dict[str, str]:
        """Versions of mypyc, which comes with mypy, and of the C compiler."""
        with suppress(PackageNotFoundError):
            return {"mypy": version("mypy"), **stacks.tool_version(_COMPILER, "--version")}
        return {}


COMPILED = CompiledEngine("compiled")
