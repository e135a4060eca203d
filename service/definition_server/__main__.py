"""``python -m definition_server``."""

from __future__ import annotations

import sys

if not sys.flags.safe_path:
    # ``-m`` put the working directory first: a file of any name there would be imported in place of a module.
    # (``python -P -m`` and the command ``definition-server`` do not.)
    sys.path.pop(0)

if __name__ == "__main__":
    from definition_server.cli import run

    run()
