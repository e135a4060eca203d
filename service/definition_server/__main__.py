"""``python -m definition_server``."""

from __future__ import annotations

import sys

if not sys.flags.safe_path:
    # ``-m`` put the working directory first: a file of any name there would be imported in place of a module.
    # (``python -P -m`` and the command ``definition-server`` do not.)
    sys.path.pop(0)

import os
import signal


def _leave(number: int, frame: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    if os.getpid() == 1:
        # The first process of a container has no default action for a signal (pid_namespaces(7)). Until the server has
        # installed its handlers, SIGTERM would be lost, and the container's stop would take its whole grace period.
        signal.signal(signal.SIGTERM, _leave)
    from definition_server.cli.main import main

    main()
