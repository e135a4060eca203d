"""``python -m definition_server``."""

from __future__ import annotations

import os
import signal
import sys


def _leave(number: int, frame: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    if os.getpid() == 1:
        # The first process of a container has no default action for a signal (pid_namespaces(7)). Until the server has
        # installed its handlers, SIGTERM would be lost, and the container's stop would take its whole grace period.
        signal.signal(signal.SIGTERM, _leave)
    from definition_server.cli.main import main

    main()
