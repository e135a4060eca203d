"""The one command of ``perf``: ``python -m perf COMMAND [OPTION…]``.

Each command is the ``main`` of a module, which is imported only when its command is given. `COMMANDS` states the
purpose, the duration and the requirements of each; ``python -m perf COMMAND --help`` shows these facts and the
command's options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

PROGRAM = "python -m perf"
UNKNOWN = 2


@dataclass(frozen=True, slots=True)
class Command:
    """One command: ``module`` has a ``main(arguments)`` that returns the exit code."""

    module: str
    does: str
    takes: str
    needs: str
    first: tuple[str, ...] = ()
    """Arguments that precede those of the command line."""


_QUIET = "a quiet machine with 2 CPUs"

COMMANDS: dict[str, Command] = {
    "measure": Command(
        "perf.harness.measure", "measure the server and judge it by perf/sla.toml",
        "about 5 min; --quick 1 min; --full 25 min; --selftest 20: half an hour",
        f"{_QUIET}; for some scenarios h2load, nghttpd, nginx and the peers",
    ),
    "report": Command(
        "perf.report.command", "write a page with charts of a record, or the README's table", "seconds", "a record",
    ),
    "witness": Command(
        "perf.benches.witness", "compare the figures of our own generator with those of h2load and ghz",
        "about 1 min; building ghz takes some minutes more", f"{_QUIET}; h2load; Go for `witness build`",
    ),
    "native": Command(
        "perf.benches.native", "measure the native transport beside nghttpd and grpcio, and under attack",
        "about 13 min; --quick less", f"{_QUIET}; h2load, nghttpd, openssl",
    ),
    "attacks": Command(
        "perf.benches.attacks", "attack a whole server, and measure its other clients and its memory",
        "about 8 min; --transport grpcio as long; --short 2 min",
        f"{_QUIET}; openssl; a PostgreSQL provider of the tests",
    ),
    "floods": Command(
        "perf.benches.native", "measure the effect of floods of frames on another client, a part of `native`",
        "about 10 min; --quick less", _QUIET, ("--only", "attacks", "--name", "native-attacks"),
    ),
    "catalogue": Command(
        "perf.benches.catalogue_100k", "measure 100,000 definitions of 2 kB against their limits", "about 1 min",
        f"{_QUIET}; a PostgreSQL provider of the tests",
    ),
    "growth": Command(
        "perf.planning.growth", "measure how cost grows from 1,000 to 1,000,000 definitions (docs/performance.md)",
        "about 8 min", f"{_QUIET}; 8 GB of memory; a PostgreSQL provider of the tests",
    ),
    "gate": Command(
        "perf.benches.row_gate", "measure the row gate, and a victim beside the first check of 100,000 rows",
        "about 2 min", f"{_QUIET}; a PostgreSQL provider of the tests",
    ),
    "memory": Command(
        "perf.harness.memory", "measure the memory of whole servers by definitions and workers", "about 5 min",
        "a PostgreSQL provider of the tests",
    ),
    "database": Command(
        "perf.benches.database_cost", "measure the cost of a change check and of a reading for the database",
        "about 1 min", f"{_QUIET}; a PostgreSQL provider of the tests",
    ),
    "flags": Command(
        "perf.benches.runtime_flags", "measure the effect of the server's runtime flags (docs/runtime-flags.md)",
        "about 2 min", f"{_QUIET}; h2load; a PostgreSQL provider of the tests",
    ),
    "version": Command(
        "perf.benches.version_cost", "measure the cost of the version in answers (docs/performance.md)",
        "about 3 min; --servers 30: 8 min", f"{_QUIET}; h2load",
    ),
    "capacity": Command(
        "perf.planning.capacity_figures", "write the figures that `definition-server capacity` plans with", "seconds",
        "a record",
    ),
    "simulate": Command(
        "perf.planning.simulation", "simulate fleets of up to 1,000 replicas: the tables of docs/capacity.md",
        "about 10 s", "a record of `database`",
    ),
    "peers": Command(
        "perf.peers.command",
        "build the servers on other stacks and our compiled engine (`peers build`), or list them (`peers list`)",
        "some minutes, once", "npm, Go, cargo or a C compiler; a stack without its toolchain is skipped",
    ),
}  # fmt: skip


def usage() -> str:
    """The help text: for every command, its purpose, duration and requirements."""
    lines = [f"usage: {PROGRAM} COMMAND [OPTION…]", "", "Measurements. `COMMAND --help` shows the options of one.", ""]
    for name, each in COMMANDS.items():
        lines += [f"  {name:<10} {each.does}", f"  {'':<10}   takes {each.takes}", f"  {'':<10}   needs {each.needs}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code, or 2 for a command that does not exist."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else UNKNOWN
    name, *rest = given
    command = COMMANDS.get(name)
    if command is None:
        print(f"perf: there is no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return UNKNOWN
    if rest in (["-h"], ["--help"]):
        print(f"{name}: {command.does}.\ntakes {command.takes}\nneeds {command.needs}\n", flush=True)
    module: Any = import_module(command.module)
    code: int = module.main([*command.first, *rest])
    return code
