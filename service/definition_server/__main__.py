"""``python -m definition_server``."""

from __future__ import annotations

import sys

if not sys.flags.safe_path:
    # ``-m`` put the working directory first, so that a file there would be imported in place of a module of the same
    # name. (``python -P -m`` and the command ``definition-server`` do not put it there.)
    sys.path.pop(0)

if __name__ == "__main__":
    from definition_server.cli import run

    run()
