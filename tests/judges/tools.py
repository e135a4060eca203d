"""The programs of the judges: where they come from, and how they are run.

Built programs are kept in ``$JUDGES_CACHE`` (``~/.cache/definition-server-judges``), each under the digest of its
sources and lock files, so a run builds only programs that have changed. A missing tool fails a run in CI (``CI`` is
set); elsewhere the tests that need it are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.support.builds import BUILD_SECONDS, BuildFailed, built, make, run

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("JUDGES_CACHE") or Path.home() / ".cache" / "definition-server-judges")
may_build = pytest.mark.timeout(BUILD_SECONDS + 180)
"""A time limit for tests that may be the first to need a program, because downloads and compilers take long."""
RUBY_CLIENT = "pb/test/client.rb"


def command(name: str, package: str) -> str:
    """Path of a program of the machine; ``package``: where to get it."""
    found = shutil.which(name)
    if found is None and Path(f"/usr/sbin/{name}").exists():
        found = f"/usr/sbin/{name}"
    return found or missing(f"{name} ({package})")


def missing(what: str) -> str:
    """Fail in CI, skip elsewhere."""
    told = f"a judge is missing: {what}"
    if os.environ.get("CI"):
        pytest.fail(told, pytrace=False)
    pytest.skip(told)


def go_programs() -> Path:
    """Directory with our programs of ``go/`` and the tools that ``go/go.mod`` names, in the versions pinned there."""
    go = command("go", "Go 1.26")

    def build(out: Path) -> None:
        _make([go, "build", "-buildvcs=false", "-o", f"{out}/", "./...", "tool"], HERE / "go")

    return _built("go", build)


def node_program() -> list[str]:
    """The command of the grpc-js client."""
    npm, node = command("npm", "Debian npm"), command("node", "Debian nodejs")

    def build(out: Path) -> None:
        for file in (HERE / "js").iterdir():
            if file.is_file():
                shutil.copy(file, out)
        _make([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], out)

    return [node, str(_built("js", build) / "catalogue.js")]


def java_program() -> list[str]:
    """The command of the grpc-java client."""
    maven, java = command("mvn", "Debian maven"), command("java", "Debian default-jdk-headless")

    def build(out: Path) -> None:
        _make([maven, "-q", "-B", f"-Dout={out}", "process-classes"], HERE / "java")

    out = _built("java", build)
    return [
        java,
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-cp",
        f"{out}/classes:{out}/lib/*",
        "judges.Catalogue",
    ]


def tonic_program() -> list[str]:
    """The command of the tonic client."""
    cargo = command("cargo", "Rust 1.88 or newer")

    def build(out: Path) -> None:
        _make([cargo, "build", "-q", "--locked", "--target-dir", str(out)], HERE / "tonic")

    return [str(_built("tonic", build) / "debug" / "catalogue")]


def ruby_interop() -> list[str]:
    """The command of the interoperability client of gRPC's Ruby library, which uses C-core."""
    ruby = command("ruby", "Debian ruby-grpc")
    asked = run([ruby, "-e", 'print Gem::Specification.find_by_name("grpc").gem_dir'], seconds=30)
    if asked.returncode:
        missing("Debian ruby-grpc")
    found = list(Path(asked.stdout).rglob(RUBY_CLIENT))
    return [ruby, "-W0", str(HERE / "ruby" / "interop.rb"), str(found[0] if found else missing(RUBY_CLIENT))]


def _make(arguments: Sequence[str], cwd: Path) -> None:
    try:
        make(arguments, cwd)
    except BuildFailed as error:
        pytest.fail(str(error), pytrace=False)


def _built(name: str, build: Callable[[Path], None]) -> Path:
    """The directory that ``build`` fills from ``HERE / name``, once for each state of the sources."""
    return built(HERE / name, CACHE, build)
