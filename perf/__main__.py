"""``python -m perf``."""

import sys

from perf.harness.measure import main

if __name__ == "__main__":
    sys.exit(main())
