"""``definition-server capacity``: the workers, cores and memory that a load needs, from measured figures."""

from __future__ import annotations

from dataclasses import asdict

import click

from definition_server.cli.exits import (
    CommandFailed,
    Exit,
    no_traceback,
    print_json,
    print_wrapped,
    print_wrapped_facts,
)
from definition_server.cli.sizing import LIMIT_OVER_PEAK, Answer, Demand, Figures, FiguresError, answer, load_figures


@click.command()
@click.option(
    "--rps", type=click.FloatRange(0, min_open=True), required=True, help="Calls a second, of all replicas together."
)
@click.option(
    "--definitions", type=click.IntRange(1), default=100_000, show_default=True, help="Definitions in the catalogue."
)
@click.option(
    "--definition-octets", type=click.IntRange(1), default=2100, show_default=True,
    help="Average size of one served definition: `validate` prints body bytes and definitions.",
)  # fmt: skip
@click.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Replicas, of which one may be down if there are several.",
)
@click.option(
    "--connections",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Client connections, of all replicas together.",
)
@click.option(
    "--margin", type=click.FloatRange(0, 0.95), default=0.4, show_default=True,
    help="Share of the cores' time that stays free.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@no_traceback()
def capacity(
    rps: float, definitions: int, definition_octets: int, replicas: int, connections: int, margin: float, as_json: bool
) -> None:
    """Print the workers, cores and memory that each replica needs for a load, with the formulas.

    The formulas use measured figures that come with this package. The output names the machine on which they were
    measured.
    """
    if rps in (float("inf"), float("-inf")) or rps != rps:
        raise click.UsageError("--rps must be a finite number.")
    demand = Demand(rps, definitions, definition_octets, replicas, connections, margin)
    try:
        figures = load_figures()
    except FiguresError as error:
        raise CommandFailed(
            f"the measured figures cannot be used: {error}; install the package again", Exit.FAILED
        ) from None
    found = answer(demand, figures)
    if as_json:
        print_json(_value(demand, found, figures))
    else:
        _print(demand, found, figures)


def _value(demand: Demand, found: Answer, figures: Figures) -> dict[str, object]:
    name, rate = figures.planning
    measured = {
        "source": figures.source, "measured": figures.measured, "machine": figures.machine, "scenario": name,
        "rps_per_core": rate, "knee": None if figures.knee is None else dict(figures.knee),
        "per_core": dict(figures.per_core),
    }  # fmt: skip
    rounded = {key: round(value, 3) for key, value in asdict(found).items()}
    return {"demand": asdict(demand), "replica": rounded, "figures": measured}


def _print(demand: Demand, found: Answer, figures: Figures) -> None:
    name, rate = figures.planning
    several = demand.replicas > 1
    each = "each replica" if several else "the server"
    print_wrapped(f"For {demand.rps:,.0f} calls a second and {demand.definitions:,} definitions, {each} needs:\n")
    print_wrapped_facts(
        [
            ("workers", f"{found.workers}  (WORKERS={found.workers})"),
            ("CPU request", f"{found.cpu_request:.1f} cores"),
            ("CPU limit", f"{found.cpu_limit} cores"),
            ("memory at rest", f"{found.resident_mb:,.0f} MiB"),
            ("memory at its peak", f"{found.peak_mb:,.0f} MiB, during a publication and the replacement of a worker"),
            ("memory limit", f"{found.memory_limit_mb:,} MiB"),
        ]
    )
    click.echo("\nCalculation:")
    load = f"{found.rps_per_replica:,.0f} calls a second"
    if several:
        load = f"{demand.rps:,.0f} ÷ {demand.replicas - 1} (one replica down) = {load}"
    knee = "" if figures.knee is None else f", knee {figures.knee['rate']:,.0f}"
    print_wrapped_facts(
        [
            ("  load", load),
            ("  one core answers", f"{rate:,.0f} a second ({name}: the most expensive scenario measured{knee})"),
            ("  one worker", f"{figures.worker_rate:,.0f} × {1 - demand.margin:.2f} (margin {demand.margin:.0%}) "
                             f"= {found.worker_rps:,.0f}"),
            ("  workers", f"max(2, ⌈{found.rps_per_replica:,.0f} ÷ {found.worker_rps:,.0f}⌉) = {found.workers}, "
                          f"busy {found.utilisation:.0%} of their time"),
            ("  CPU limit", f"workers + 1: the master uses {found.publication_cpu_seconds:.1f} s of a core for each "
                            "publication"),
            ("  memory limit", f"peak {found.peak_mb:,.0f} × {LIMIT_OVER_PEAK:g} (20 % above), "
                               f"snapshot {found.snapshot_mb:,.0f} MiB"),
        ]
    )  # fmt: skip
    print_wrapped(f"\nMeasured {figures.measured[:10]} on {figures.machine} ({figures.source}).")
    print_wrapped("Other machines differ: measure yours with `nox -s perf`.")
