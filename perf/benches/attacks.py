"""The cost of attackers for other clients: ``python -m perf attacks [--only NAME] [--transport …] [--short] …``.

Each attack of ``perf/attacks.toml`` is made by separate processes on a whole server with one worker, from other
addresses than the victim's. The victim is measured alone and beside the attack in the same run: steady calls on an open
connection, and connect + call on new ones. Then the memory of worker and master is read until it is near its size
before the attack again. With ``--short``, only attacks that are judged by counts are made, and no time is judged.

The record goes to ``perf/results/``; ``--show`` prints the table of the newest one, and ``--page docs/security.md``
writes it into that page. The command ``floods`` measures attacks by floods of frames.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.certificates import Authority
from tests.support.providers import any_provider_or_skip, create_database
from tests.support.results import newest
from tests.support.table import Table

from perf.benches import attack_table
from perf.benches.attack_list import VARIANTS, Attack, AttackList, Limit, load
from perf.benches.attack_stage import Stage, Variant, stage
from perf.benches.figures import Figures, Row
from perf.targets.target import TargetFailed, keep_to_client_cpu, raise_descriptor_limit

RECORD = "attacks"
DEFINITIONS, CODE_OCTETS = 200, 1400
_UNITS = {"_ms": "ms", "_mb": "MB", "_seconds": "s", "_share": "of 1", "_lines": "lines"}
_OF_TIME = "_ms"
FAILURES = (TargetFailed, OSError, AssertionError)


def unit(figure: str) -> str:
    """The unit of a figure, from its name."""
    return next((name for ending, name in _UNITS.items() if figure.endswith(ending)), "")


class Measurement:
    """The attacks of one variant, and their rows."""

    def __init__(self, figures: Figures, plan: AttackList, table: Table, variant: Variant, *, short: bool) -> None:
        self._figures, self._plan, self._table, self._variant, self._short = figures, plan, table, variant, short

    def run(self, attacks: Sequence[Attack]) -> None:
        """All attacks, each on a server of its own, so that memory which one attack leaves is not counted for
        another."""
        for attack in attacks:
            if attack.made_in(self._variant.encryption, short=self._short):
                try:
                    with stage(self._table, self._variant, attack.settings) as own:
                        self._play(own, attack)
                except FAILURES as error:
                    self._fail(attack, error)

    def _play(self, on: Stage, attack: Attack) -> None:
        found, detail = on.play(attack, self._plan, short=self._short)
        if attack.action == "shutdown":
            with stage(self._table, self._variant, attack.settings) as calm:
                found["calm_shutdown_seconds"] = calm.shut_down()
        judged = self._variant.transport in attack.transports
        limits = {limit.figure: limit for limit in attack.limits if self._applies(attack, limit)}
        for name, value in sorted(found.items()):
            row = Row(self._name(attack, name), unit(name), value)
            if (limit := limits.pop(name, None)) and judged:
                row.least = limit.least
                row.most = None if limit.most is None else round(limit.bound(found), 3)
            self._figures.rows.append(row)
        for limit in limits.values() if judged else ():
            self._figures.rows.append(Row(self._name(attack, limit.figure), "", least=limit.least, most=limit.most))
        self._figures.rows[-1].detail = detail
        missed = [
            row for row in self._figures.rows if row.name.startswith(self._name(attack, "")) and row.kept is False
        ]
        told = ", ".join(f"{row.name.rpartition(': ')[2]} {row.value}" for row in missed) if judged else "not judged"
        print(f"{self._variant.name} · {attack.name}: {'MISSED: ' + told if missed else told or 'kept'}", flush=True)

    def _applies(self, attack: Attack, limit: Limit) -> bool:
        """Whether a limit can be judged in this measurement."""
        if self._short and limit.figure.endswith(_OF_TIME):
            return False
        if attack.action == "shutdown":
            return limit.figure == "shutdown_seconds"
        return attack.action != "drain" or limit.figure not in _NOT_AFTER_THE_END

    def _fail(self, attack: Attack, error: BaseException) -> None:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        row = Row(self._name(attack, "measured"), "", error=text)
        self._figures.rows.append(row)
        print(f"{self._variant.name} · {attack.name}: no figure: {text}", flush=True)

    def _name(self, attack: Attack, figure: str) -> str:
        return f"{self._variant.name} · {attack.name}: {figure}"


_NOT_AFTER_THE_END = {"worker_after_mb", "master_after_mb", "workers_died"}
"""The figures of an attack during which the server has ended."""


def variants(transports: Sequence[str], encryption: Sequence[str], folder: Path) -> Iterator[Variant]:
    """All pairs of transport and encryption; the certificate is made once."""
    authority = Authority(folder)
    certificate = authority.sign("localhost")
    for transport in transports:
        for each in encryption:
            yield Variant(transport, certificate, authority.cert) if each == "tls" else Variant(transport)


def main(given: Sequence[str] | None = None) -> int:
    """Attack, store the record, print the table. Returns 1 if a limit is not kept, or nothing could be measured."""
    plan = load()
    parser = argparse.ArgumentParser(
        prog="python -m perf attacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[each.name for each in plan.attacks], action="append", metavar="NAME",
                        help="make only this attack; may be repeated")  # fmt: skip
    parser.add_argument("--transport", choices=("native", "grpcio"), action="append", help="default: native")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: both")
    parser.add_argument("--short", action="store_true", help="only attacks judged by counts; no time is judged")
    parser.add_argument("--name", default=RECORD, help="name of the record's file, after the date")
    parser.add_argument("--no-record", action="store_true", help="store no record")
    parser.add_argument("--show", action="store_true", help="print the table of the newest record, and measure nothing")
    parser.add_argument(
        "--page", metavar="PAGE", type=Path, help="rewrite the table in this file from the newest record"
    )
    parser.add_argument("--check", action="store_true", help="with --page: change nothing, fail if it is stale")
    parser.add_argument("--list", action="store_true", help="print the attacks and their limits")
    arguments = parser.parse_args(given)
    if arguments.list:
        print(attack_table.listed(plan))
        return 0
    if arguments.show:
        return attack_table.show(plan, arguments.name)
    if arguments.page:
        return _page(plan, arguments)
    attacks = [
        each for each in plan.attacks
        if (not arguments.only or each.name in arguments.only) and (each.short or not arguments.short)
    ]  # fmt: skip
    try:
        figures = measure(plan, attacks, arguments)
    except pytest.skip.Exception as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 1
    print(attack_table.table(plan, figures.rows))
    if not arguments.no_record:
        print(f"stored in {figures.save(arguments.name)}")
    return 0 if figures.kept else 1


def _page(plan: AttackList, arguments: argparse.Namespace) -> int:
    record = newest(arguments.name)
    if record is None:
        print(f"there is no record {arguments.name!r} in perf/results", file=sys.stderr)
        return 1
    code = attack_table.write(plan, arguments.page, record, check=arguments.check)
    if code and arguments.check:
        print(f"{arguments.page}: is not that of {record.name}; `python -m perf attacks --page {arguments.page}`",
              file=sys.stderr)  # fmt: skip
    return code


def measure(plan: AttackList, attacks: Sequence[Attack], arguments: argparse.Namespace) -> Figures:
    """Make ``attacks`` in all variants that ``arguments`` name."""
    keep_to_client_cpu()
    raise_descriptor_limit()
    figures = Figures("attacks and their victims", vars(arguments))
    database = any_provider_or_skip()
    try:
        table = Table(create_database(database.url, "attacks"))
        table.add_commands(DEFINITIONS, CODE_OCTETS)
        with tempfile.TemporaryDirectory() as folder:
            encryption = arguments.variant or VARIANTS
            for variant in variants(arguments.transport or ["native"], encryption, Path(folder)):
                Measurement(figures, plan, table, variant, short=arguments.short).run(attacks)
    finally:
        database.close()
    figures.finish()
    return figures
