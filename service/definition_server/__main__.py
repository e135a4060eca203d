"""``python -m definition_server``."""

from __future__ import annotations

import os
import signal
import sys


def _leave(number: int, frame: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    if os.getpid() == 1:
        # The first process of a container has no default action for a signal (pid_namespaces(7)): until the server has
        # handlers of its own, SIGTERM would be lost, and whoever sent it would wait a whole grace period.
        signal.signal(signal.SIGTERM, _leave)
    from definition_server.cli.main import main

    main()
