"""A worker of another revision: ``python -m perf.harness.serve DEFINITIONS OCTETS TRANSPORT [CERT KEY]``.

Prints one JSON object when it serves, with the port and the worker's process id, or ``{"error": …}``; ends when its
standard input ends. The revision is the first that ``PYTHONPATH`` names. Both sides of the control socket are of that
revision, so changes of the protocol between master and worker do not matter. Only the parts of the package that
`perf.targets.target` uses must be compatible; otherwise the result is an error instead of a figure.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Serve until standard input ends."""
    definitions, octets, transport, *files = arguments
    with ExitStack() as stack:
        try:
            # Imported here, so that a missing name in the revision becomes one line, not a traceback.
            import definition_server
            from perf.targets.catalogue import Catalogue
            from perf.targets.target import TargetFailed, keep_to_client_cpu, worker

            keep_to_client_cpu()
            catalogue = Catalogue(int(definitions), int(octets))
            stack.callback(catalogue.close)
            tls = dict(zip(("tls_cert_file", "tls_key_file"), files, strict=False))
            served = stack.enter_context(worker(transport, catalogue.descriptor, catalogue.built, **tls))
        except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            return 1
        except TargetFailed as error:
            print(json.dumps({"error": str(error)}), flush=True)
            return 1
        report = {
            "port": served.target.port,
            "pid": served.target.pid,
            "code": str(Path(definition_server.__file__).parent),
        }
        print(json.dumps(report), flush=True)
        os.read(sys.stdin.fileno(), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
