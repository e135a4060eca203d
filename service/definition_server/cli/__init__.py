"""Commands for operators and newcomers."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from definition_server.inherited import prepare

_INTERRUPTED = 130
"""`Exit.INTERRUPTED`, which is not imported yet."""


def run() -> None:
    """The command ``definition-server``. Its imports take a while, and Ctrl-C during the imports ends it without a
    traceback."""
    prepare()
    try:
        with lasting_imports():
            from definition_server.cli.main import main
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    main()


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Within this context, imported objects are exempt from garbage collection, because they live as long as the
    process.

    Otherwise the collector would examine these objects in vain during the imports, which takes a tenth of the time of a
    server's imports, and again in each full collection.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
