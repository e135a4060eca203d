"""The servers on other stacks, and our own compiled engine: ``python -m perf peers build [NAME…]`` builds them,
``peers list`` lists them.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.support.builds import BuildFailed

from perf.peers import BUILDS, NAMES, missing, versions
from perf.peers.compiled import COMPILED
from perf.peers.stacks import CACHE


def build(names: list[str]) -> int:
    """Build ``names``, except peers without their toolchain, and print a line for each. Returns 1 if a build failed."""
    failed = 0
    for name in names:
        stack = BUILDS[name]
        if stack.missing_tools:
            print(f"{name:<12} skipped: {stack.missing_tools}", flush=True)
            continue
        began = time.monotonic()
        try:
            kept = stack.missing == ""
            stack.build()
        except BuildFailed as error:
            failed = 1
            print(f"{name:<12} failed: {error}", file=sys.stderr, flush=True)
        else:
            print(f"{name:<12} {'ready' if kept else f'built in {time.monotonic() - began:.0f} s'}", flush=True)
    return failed


def show() -> int:
    """Print a line for each peer."""
    print(f"builds are stored in {CACHE}")
    for name in (COMPILED.name, *NAMES):
        versions_of = ", ".join(f"{what} {number}" for what, number in versions(name).items())
        print(f"{name:<12} {missing(name) or 'ready':<45} {versions_of}".rstrip())
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m perf peers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build").add_argument("names", nargs="*", metavar="NAME", help=", ".join(BUILDS))
    commands.add_parser("list")
    parsed = parser.parse_args(arguments)
    if parsed.command == "list":
        return show()
    unknown = set(parsed.names) - set(BUILDS)
    if unknown:
        parser.error(f"there is no peer {', '.join(sorted(unknown))} to build; there are {', '.join(BUILDS)}")
    return build(parsed.names or list(BUILDS))
