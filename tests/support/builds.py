"""Programs in other languages, built once for each state of their sources and kept outside the repository."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

BUILD_SECONDS = 900


class BuildFailed(Exception):
    """A compiler or a package manager failed; the text is its output."""


def run(arguments: Sequence[str], *, seconds: float, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Raises:
        subprocess.TimeoutExpired: after ``seconds``; the program is killed.
    """
    environment = os.environ | {"GRPC_GO_LOG_SEVERITY_LEVEL": "error"}
    return subprocess.run(
        arguments, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds,
        check=False,
    )  # fmt: skip


def make(arguments: Sequence[str], cwd: Path) -> None:
    """Run one step of a build in ``cwd``.

    Raises:
        BuildFailed: if it fails or takes longer than `BUILD_SECONDS`.
    """
    told = " ".join(arguments)
    try:
        done = run(arguments, seconds=BUILD_SECONDS, cwd=cwd)
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{told}: not done after {BUILD_SECONDS} s") from None
    if done.returncode:
        raise BuildFailed(f"{told}:\n{done.stdout}{done.stderr}")


def place(source: Path, cache: Path, also: Sequence[Path] = ()) -> Path:
    """The directory in ``cache`` for the build of ``source`` in its present state. It need not exist yet.

    ``also``: other files that the build depends on.
    """
    digest = hashlib.sha256()
    # Python's caches in ``source`` are not sources, and may appear and vanish.
    files = (path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    for file in sorted((*files, *also)):
        octets = file.read_bytes()
        digest.update(f"{file.relative_to(source.parent)} {len(octets)}\n".encode() + octets)
    return cache / f"{source.name}-{digest.hexdigest()[:16]}"


def built(source: Path, cache: Path, build: Callable[[Path], None], also: Sequence[Path] = ()) -> Path:
    """The directory that ``build`` fills from ``source``. It is filled once for each state of the sources.

    ``also``: as for `place`.

    Raises:
        BuildFailed: if ``build`` raises it; the directory is then removed.
    """
    finished = place(source, cache, also)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{source.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{source.name}-", dir=cache))
            try:
                build(unfinished)
                unfinished.rename(finished)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return finished
