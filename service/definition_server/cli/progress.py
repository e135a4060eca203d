"""The progress that commands show on stderr if stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def progress_bar() -> Progress:
    """A progress bar on stderr if stderr is a terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """``text`` and a moving sign on stderr if stderr is a terminal."""
    if not sys.stderr.isatty():  # FORCE_COLOR makes Rich take a pipe for a terminal
        yield
        return
    with Console(stderr=True).status(text):
        yield
