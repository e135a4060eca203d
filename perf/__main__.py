"""``python -m perf``."""

import sys

from perf.cli import main

if __name__ == "__main__":
    sys.exit(main())
