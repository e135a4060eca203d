"""The command: ``python -m tests.simulation.publication --seeds N --start S``."""

from __future__ import annotations

import argparse
import sys
from time import process_time

from tests.simulation.publication.world import Failure, run_seed


def main() -> int:
    """Run seeds, a day each. Exit code 1 at the first that fails, with the command that replays it."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.publication", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--keep-going", action="store_true", help="continue after a failure, and count failures")
    options = parser.parse_args()
    begun, failures = process_time(), 0
    hours = cycles = publications = checks = lives = 0.0
    for seed in range(options.start, options.start + options.seeds):
        try:
            ran = run_seed(seed, _print if options.trace else None)
        except Failure as failure:
            failures += 1
            _print(str(failure))
            if not options.keep_going:
                return 1
            continue
        hours, cycles, publications = hours + ran.hours, cycles + ran.cycles, publications + ran.publications
        checks, lives = checks + ran.checks, lives + ran.lives
    seconds = process_time() - begun
    _print(
        f"{options.seeds} seeds, {failures} failed; {hours:,.0f} hours, {cycles:,.0f} cycles, {publications:,.0f} "
        f"publications and {lives:,.0f} starts in {seconds:.1f} s of CPU: {60 * hours / seconds:,.0f} hours a minute; "
        f"{checks:,.0f} checks"
    )
    return min(failures, 1)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
