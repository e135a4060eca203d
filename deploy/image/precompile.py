"""Compile what the server imports, the standard library's part included, while the image is built.

``PYTHONPYCACHEPREFIX=/opt/bytecode python precompile.py``. Base images come without the bytecode of the standard
library (it would double its size), and a process that may not write cannot make up for it: each start of each process,
workers included, would compile some hundred modules again. So every module of the package is imported here, and
whatever was loaded by that is compiled; the rest of the library stays as it is.

``UNCHECKED_HASH`` (PEP 552): the files of an image do not change, but their dates may, where a tool repacks its layers.
Bytecode that is checked by date would then be thrown away at every start, without a word.
"""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module
from importlib.util import cache_from_source, find_spec
from py_compile import PycInvalidationMode, compile  # noqa: A004 - its name

LATE = ("grpc._channel", "encodings.idna", "rich._emoji_codes")
"""Imported by what a function does: the first call of a client command; a host name that is looked up; a table.

`tests/containers` finds out whether any is missing.
"""


def main() -> int:
    """Import all, compile what came with it. Returns the exit code: 1 where bytecode would lie beside the sources."""
    if sys.pycache_prefix is None:
        sys.stderr.write("PYTHONPYCACHEPREFIX names no directory for the bytecode\n")
        return 1
    wanted: set[str] = set()
    # Every attempt counts, not only what is loaded in the end: structlog tries modules at every start that give up for
    # want of a library, after they have been compiled.
    sys.addaudithook(lambda event, told: wanted.add(str(told[0])) if event == "import" else None)
    package = import_module("definition_server")
    for module in pkgutil.walk_packages(package.__path__, "definition_server."):
        import_module(module.name)
    for name in LATE:
        import_module(name)
    wanted |= set(sys.modules)  # parents are imported without an event
    sources = {source for name in tuple(wanted) if (source := _source(name))}
    for source in sources:
        compile(source, cache_from_source(source), doraise=True, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
    sys.stdout.write(f"compiled {len(sources)} modules\n")
    return 0


def _source(name: str) -> str | None:
    """Path of a module's source; None where there is no such module, or it has none."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError, AttributeError):  # no such parent; `__main__`; a parent that is no package
        return None
    return spec.origin if spec is not None and (spec.origin or "").endswith(".py") else None


if __name__ == "__main__":
    sys.exit(main())
