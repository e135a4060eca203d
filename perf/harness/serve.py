"""A worker of another revision: ``python -m perf.harness.serve DEFINITIONS OCTETS TRANSPORT [CERT KEY]``.

Prints one JSON object when it serves, the port and the worker's process, or ``{"error": …}``; ends when its standard
input does. The revision is the one that ``PYTHONPATH`` names first. Master's side and worker's side are of the same
revision, so that it does not matter how the two spoke to each other then. Only what `perf.targets.target`
uses of the package has to be as it is now; where it is not, there is an error, and no figure.
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
            # Imported here: a revision that lacks something says so in one line, not in a traceback.
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
        told = {
            "port": served.target.port,
            "pid": served.target.pid,
            "code": str(Path(definition_server.__file__).parent),
        }
        print(json.dumps(told), flush=True)
        os.read(sys.stdin.fileno(), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
