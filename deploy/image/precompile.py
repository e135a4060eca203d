"""Compile all modules that the server imports, those of the standard library included, while the image is built.

``PYTHONPYCACHEPREFIX=/opt/bytecode python precompile.py``. Base images come without the bytecode of the standard
library (it would double its size), and a process on a read-only file system cannot write it: each start of each
process, workers included, would compile some hundred modules again. So this program imports every module of the package
and compiles all modules that this loads; the rest of the standard library is not compiled.

``UNCHECKED_HASH`` (PEP 552): the files of an image do not change, but their dates may, where a tool repacks its layers.
Bytecode that is checked by date would then be silently ignored at every start.
"""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module
from importlib.util import cache_from_source, find_spec
from py_compile import PycInvalidationMode, compile  # noqa: A004 - its name

LATE = ("grpc._channel", "encodings.idna", "rich._emoji_codes")
"""Modules that are imported inside functions: at the first call of a client command, the first look-up of a host name,
the first table.

`tests/containers` checks that none is missing.
"""

OPTIONAL = {"definition_server.observability.otlp": "opentelemetry"}
"""Modules of the package that need a library which the image has only where it is asked for (``EXTRAS``)."""


def main() -> int:
    """Import all modules and compile them. Returns the exit code: 1 if bytecode would be written beside the sources."""
    if sys.pycache_prefix is None:
        sys.stderr.write("PYTHONPYCACHEPREFIX names no directory for the bytecode\n")
        return 1
    wanted: set[str] = set()
    # Every attempt counts, not only modules that are loaded in the end: at every start structlog tries modules that are
    # compiled and then fail because a library is missing.
    sys.addaudithook(lambda event, told: wanted.add(str(told[0])) if event == "import" else None)
    package = import_module("definition_server")
    for module in pkgutil.walk_packages(package.__path__, "definition_server."):
        if find_spec(OPTIONAL.get(module.name, "sys")) is not None:
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
    """Path of a module's source; None if there is no such module, or it has no source."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError, AttributeError):  # no such parent; `__main__`; a parent that is no package
        return None
    return spec.origin if spec is not None and (spec.origin or "").endswith(".py") else None


if __name__ == "__main__":
    sys.exit(main())
