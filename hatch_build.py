"""The variables that a build reads.

``PROJECT_URL``: the project's public address, for the links of an index. ``COMPILED_ENGINE=1``: the wheel gets the
modules that `pyproject.toml` lists compiled by mypyc, too; ``COMPILED_ENGINE=required``: or there is no wheel.
docs/releasing.md describes both.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface
from packaging.specifiers import SpecifierSet

PAGES = {
    "Homepage": "", "Source": "", "Documentation": "/blob/HEAD/docs/README.md", "Changelog": "/blob/HEAD/CHANGELOG.md",
    "Security": "/blob/HEAD/SECURITY.md",
}  # fmt: skip
"""Name of a link → path below the address of the repository."""

_LINK = re.compile(r"(!?)(\[[^\]\[]*\])\((?!https?:|mailto:|#)([^)\s]+)\)")


class ProjectUrls(MetadataHookInterface):
    """Fills ``project.urls`` and the README. Without the variable there are no links of the project, and those of the
    README stay relative: whoever publishes the wheel knows its address.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the links and the README to ``metadata``.

        Raises:
            SystemExit: if this Python is too old. pip compares versions itself, but where an extra is asked for as well
                (``.[embedded]``), some releases of it first try every release of every requirement.
            ValueError: if the variable is not an address of a web page.
        """
        required, present = metadata["requires-python"], platform.python_version()
        if not SpecifierSet(required).contains(present, prereleases=True):
            sys.exit(f"AVAP Definition Server needs Python {required}, and this is Python {present} ({sys.executable})")
        address = os.environ.get("PROJECT_URL", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if address:
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise ValueError(f"PROJECT_URL is {address!r}: set it to the address of the repository, https://…")
            metadata["urls"] = {name: address + path for name, path in PAGES.items()}
            text = with_absolute_links(text, address)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(text: str, address: str) -> str:
    """``text`` in Markdown with links to files of the repository at ``address``, for a reader who has only the text.

    A picture needs the file itself (``raw``), a page the view of it (``blob``).
    """
    return _LINK.sub(
        lambda found: f"{found[1]}{found[2]}({address}/{'raw' if found[1] else 'blob'}/HEAD/{found[3]})", text
    )


COMPILE_SECONDS = 900
_COMPILE = """
import sys
from mypyc.build import mypycify
from setuptools import setup
group, *modules = sys.argv[1:]
options = ["--python-executable", sys.executable]
extensions = mypycify([*options, *modules], group_name=group, opt_level="3", debug_level="0")
for each in extensions:
    each.extra_compile_args.append("-g0")
    each.extra_link_args.append("-s")
setup(name=group, py_modules=[], ext_modules=extensions, script_args=["-q", "build_ext", "--inplace"])
"""
"""In a process of its own, because mypyc ends its process where something fails."""

_LOAD = """
import os, sys
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        __import__(name)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"ImportError: {name}, imported first, ends its process with {code}")
"""
"""Imports each module in a process of its own: whoever uses the package may import any of them first."""


class CompiledEngine(BuildHookInterface[Any]):
    """Adds compiled modules to the wheel, beside their sources.

    Another Python than that of the build, which cannot load them, runs the sources. Where they cannot be compiled, one
    line says why, and the wheel is the pure one.
    """

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """The packages that only a compiled build needs."""
        return list(self.config["requires"]) if self._wanted("wheel") else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and add the files to ``build_data``. Not for an editable installation, whose sources change.

        Raises:
            RuntimeError: where they cannot be compiled, with ``COMPILED_ENGINE=required``.
        """
        if version == "editable" or not self._wanted(self.target_name):
            return
        self._folder = tempfile.mkdtemp(prefix="compiled-engine-")
        try:
            files = compiled(Path(self.root) / self.config["sources"], self.config["modules"], Path(self._folder))
        except CannotCompile as reason:
            if os.environ["COMPILED_ENGINE"] == "required":
                raise RuntimeError(f"COMPILED_ENGINE=required: {reason}") from None
            self.app.display_warning(f"COMPILED_ENGINE: {reason}; the wheel has the pure Python form")
            return
        build_data["force_include"].update({str(path): name for name, path in files.items()})
        build_data.update(infer_tag=True, pure_python=False)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if folder := getattr(self, "_folder", None):
            shutil.rmtree(folder, ignore_errors=True)

    def _wanted(self, target: str) -> bool:
        return target == "wheel" and os.environ.get("COMPILED_ENGINE", "") not in ("", "0")


class CannotCompile(Exception):
    """The reason, in one line."""


def compiled(sources: Path, patterns: list[str], folder: Path) -> dict[str, Path]:
    """Compile the modules below ``sources`` that ``patterns`` (globs) name, in ``folder``. Returns path in the wheel →
    file.

    Raises:
        CannotCompile: where a tool is missing or fails, or the result cannot be loaded.
    """
    compiler = shlex.split(os.environ.get("CC") or str(sysconfig.get_config_var("CC") or "cc"))
    if shutil.which(compiler[0]) is None:
        raise CannotCompile(f"there is no C compiler {compiler[0]!r}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise CannotCompile("Python's C headers are missing (Debian: python3-dev)")
    modules = sorted(str(path.relative_to(sources)) for pattern in patterns for path in sources.glob(pattern))
    package = modules[0].partition("/")[0]
    shutil.copytree(sources / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    _run(folder, "-c", _COMPILE, package, *modules)
    _run(folder, "-c", _LOAD, *(module[:-3].replace("/", ".") for module in modules))
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.so")) if "build" not in path.parts}


def _run(folder: Path, *arguments: str) -> None:
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CannotCompile(f"the modules are not compiled after {COMPILE_SECONDS} s") from None
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        raise CannotCompile(said[-1].strip()[:300] if said else f"the compiler ends with exit code {done.returncode}")
