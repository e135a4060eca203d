"""The cost of the version in answers (``VERSION_METADATA``): ``python -m perf version [--servers N] [--transport T]``.

Two workers serve one catalogue on the same CPU, one with the version in its answers and one without, and answer
h2load in turn. The figure is the ratio of their CPU times per call. A third worker, also without the version, shows
how far two equal workers differ. Every group of three workers is new, because the layout of a process's memory
changes its speed by some per cent for as long as it lives.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path

from tests.support import wire

from perf.targets.catalogue import Catalogue, name_of
from perf.targets.target import TargetFailed, h2load, worker

WITH, WITHOUT, AGAIN = "with", "without", "without, again"
SHAPES = {
    "native": {"64 connections, one call at a time": (64, 1, 10_000), "4 connections, 32 calls": (4, 32, 30_000)},
    "grpcio": {"16 connections, one call at a time": (16, 1, 2_000)},
}
"""Transport → name of a load → connections, concurrent calls on each, and calls of one run."""
_PREFIX = 5
"""The octets before each message: gRPC's flag and length."""
RUNS = 5
"""The runs of each worker, of which the median counts."""

CpuTimes = dict[str, list[float]]
"""Kind of worker → microseconds of CPU time per call, one figure for each worker."""


def measure(transport: str, servers: int) -> dict[str, CpuTimes]:
    """The CPU times of ``servers`` workers of each kind, by load."""
    orders = list(permutations((WITH, WITHOUT, AGAIN)))
    found: dict[str, CpuTimes] = {load: {kind: [] for kind in orders[0]} for load in SHAPES[transport]}
    with ExitStack() as whole:
        catalogue = Catalogue(189, 1500)
        whole.callback(catalogue.close)
        request = Path(whole.enter_context(tempfile.NamedTemporaryFile()).name)
        request.write_bytes(wire.message(wire.command_request(name_of(1).encode())))
        for group in range(servers):
            with ExitStack() as stack:
                workers = {
                    kind: stack.enter_context(
                        worker(transport, catalogue.descriptor, catalogue.built, version_metadata=kind == WITH)
                    )
                    for kind in orders[group % len(orders)]
                }
                for load, (connections, streams, calls) in SHAPES[transport].items():
                    runs: CpuTimes = {kind: [] for kind in workers}
                    for run in range(RUNS + 1):  # the first run of a worker is not counted
                        for kind in orders[(group + run) % len(orders)]:
                            made = h2load(
                                workers[kind].target, wire.GET_COMMAND.decode(), calls, connections, streams,
                                octets=catalogue.answer_octets + _PREFIX, request=request,
                            )  # fmt: skip
                            runs[kind].append(made["server_cpu_seconds"] / calls * 1e6)
                    for kind, each in runs.items():
                        found[load][kind].append(statistics.median(each[1:]))
    return found


def ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """The median of the paired ratios, and the limits of its interval of 95 %, of the order statistics."""
    ratios = sorted(one / other for one, other in zip(first, second, strict=True))
    low = max(0, int(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))
    return statistics.median(ratios), ratios[low], ratios[-1 - low]


def lines(found: Mapping[str, CpuTimes]) -> list[str]:
    """The figures as text."""
    shown = []
    for load, times in found.items():
        shown.append(f"{load}: " + ", ".join(f"{kind} {statistics.median(us):.2f} µs" for kind, us in times.items()))
        for name, first, second in (("without / with", WITHOUT, WITH), ("two equal workers", WITHOUT, AGAIN)):
            shown.append("  {}: {:.3f} ({:.3f}-{:.3f})".format(name, *ratio(times[first], times[second])))
    return shown


def main(given: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 if nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python -m perf version")
    parser.add_argument("--servers", type=int, default=12, metavar="N", help="workers of each kind (default: 12)")
    parser.add_argument("--transport", choices=tuple(SHAPES), default="native")
    arguments = parser.parse_args(given)
    try:
        print("\n".join(lines(measure(arguments.transport, arguments.servers))))
    except TargetFailed as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 1
    return 0
