"""The command: ``python -m tests.simulation.engine --seeds N --start S``."""

from __future__ import annotations

import argparse
import sys
from time import perf_counter, process_time

from tests.simulation.engine.world import NETWORKS, Failure, run_seed


def main() -> int:
    """Run seeds. Ends with exit code 1 at the first failing seed, and prints the command that replays it."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.engine", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--network", choices=NETWORKS, default="random", help="how octets are divided (%(default)s)")
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--keep-going", action="store_true", help="continue after a failure, and count failures")
    options = parser.parse_args()
    begun, worked, events, failures = perf_counter(), process_time(), 0, 0
    for seed in range(options.start, options.start + options.seeds):
        try:
            events += run_seed(seed, options.network, _print if options.trace else None).events
        except Failure as failure:
            failures += 1
            _print(str(failure))
            if not options.keep_going:
                return 1
    seconds, worked = perf_counter() - begun, process_time() - worked
    _print(
        f"{options.seeds} seeds, {failures} failed; {events} events in {seconds:.1f} s, {worked:.1f} s of CPU: "
        f"{60 * options.seeds / worked:.0f} seeds a minute of CPU"
    )
    return min(failures, 1)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
