"""``python -m perf``."""

import sys

from perf.commands import main

if __name__ == "__main__":
    sys.exit(main())
