"""The table of a record of attacks: the figures before and now, the victim, the memory, the verdict."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.results import newest

from perf.benches.attack_list import CALM, STRETCH, Attack, AttackList
from perf.benches.figures import Row

_HEAD = ("attack", "before", "today", "victim, steady: P50 / P99 / max", "victim, connect + call: P50 / P99 / max",
         "undisturbed connect + call: P50 / P99", "stretch of the worker", "RSS of worker / master after, MB",
         "verdict")  # fmt: skip
_USUAL = ("steady_", "connect_", CALM, "worker_", "master_", "settled_", "connected", "disconnected", "not_connected",
          "workers_died")  # fmt: skip


def table(plan: AttackList, rows: Sequence[Row]) -> str:
    """A Markdown table, one row for each variant and attack."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    for attack, variant, found in _runs(plan, rows):
        lines.append("| " + " | ".join((
            f"{attack.title} ({variant})", attack.before, _today(found), _latency(found, "steady"),
            _latency(found, "connect"), _latency(found, CALM + "connect", ("p50", "p99")), _stretch(found),
            _memory(found), _judged(attack, variant, found),
        )) + " |")  # fmt: skip
    return "\n".join(lines)


def _runs(plan: AttackList, rows: Sequence[Row]) -> Iterator[tuple[Attack, str, dict[str, Row]]]:
    """Attack, variant, and the figures by name, in the order of the record."""
    runs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        variant, _, rest = row.name.partition(" · ")
        name, _, figure = rest.partition(": ")
        runs.setdefault((variant, name), {})[figure] = row
    attacks = {each.name: each for each in plan.attacks}
    for (variant, name), found in runs.items():
        if name in attacks:
            yield attacks[name], variant, found


BEGIN, END = "<!-- measured attacks -->", "<!-- /measured attacks -->"
_PAGE_HEAD = (
    "attack",
    "over",
    "connect + call: P50 / P99, ms",
    "undisturbed",
    "stretch",
    "steady calls: P50 / P99, ms",
    "MB after, worker / master",
    "limits",
)


def page(plan: AttackList, record: Mapping[str, Any], name: str) -> str:
    """The table of docs/security.md: the attacks on the native transport, each in the variants in which it was made,
    and the source."""
    lines = ["| " + " | ".join(_PAGE_HEAD) + " |", "|---" * len(_PAGE_HEAD) + "|"]
    for attack, variant, found in _runs(plan, _rows(record)):
        transport, _, encryption = variant.partition(", ")
        if transport != "native":
            continue
        own = found.get("shutdown_seconds")
        lines.append("| " + " | ".join((
            attack.title, "TLS" if encryption == "tls" else encryption, _latency(found, "connect", _MIDDLE),
            _latency(found, CALM + "connect", _MIDDLE), _stretch(found),
            _latency(found, "steady", _MIDDLE) if own is None else f"a stop takes {own.value:g} s",
            _memory(found), _judged(attack, variant, found),
        )) + " |")  # fmt: skip
    machine = record["machine"]
    load, after = (f"{machine[each][0]:.1f}" for each in ("load_before", "load_after"))
    source = (
        f"[{name}](../perf/results/{name}): {record['measured'][:10]}, {machine['cpu']}, {machine['cpus']} CPUs, "
        f"Python {machine['python']}, load average {load} before and {after} after."
    )
    return "\n".join((*lines, "", source)) + "\n"


_MIDDLE = ("p50", "p99")


def write(plan: AttackList, file: Path, record: Path, *, check: bool) -> int:
    """Put the table of ``record`` between the marks of ``file``. Returns 1 if the marks are missing. With ``check``,
    write nothing, and return 1 if the table differs from the record."""
    old = file.read_text(encoding="utf-8")
    table = page(plan, _read(record), record.name)
    new, count = re.subn(
        rf"({BEGIN}\n).*?({END})", lambda found: f"{found[1]}\n{table}\n{found[2]}", old, flags=re.DOTALL
    )
    if count != 1:
        print(f"{file.name}: needs the line {BEGIN} and after it the line {END}, once", file=sys.stderr)
        return 1
    if check:
        return int(new != old)
    file.write_text(new, encoding="utf-8")
    print(f"{file.name}: {'rewritten' if new != old else 'unchanged'}, from {record.name}")
    return 0


def listed(plan: AttackList) -> str:
    """The attacks and their limits."""
    lines = []
    for attack in plan.attacks:
        lines.append(f"{attack.name}: {attack.title}{' (short)' * bool(attack.short)}")
        for limit in attack.limits:
            sign, value = (">=", limit.least) if limit.least is not None else ("<=", limit.most)
            ratio = f", or {limit.ratio:g} x undisturbed" if limit.ratio else ""
            lines.append(f"    {limit.figure} {sign} {value:g}{ratio}{': ' + limit.why if limit.why else ''}")
        if attack.why_not:
            lines.append(f"    not judged on grpcio: {attack.why_not}")
    return "\n".join(lines)


def show(plan: AttackList, name: str) -> int:
    """Print the table of the newest record with this name. Returns 1 if there is none."""
    path = newest(name)
    if path is None:
        print(f"there is no record {name!r} in perf/results", file=sys.stderr)
        return 1
    print(f"{path.name}\n\n{table(plan, _rows(_read(path)))}")
    return 0


def _read(record: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def _rows(record: Mapping[str, Any]) -> list[Row]:
    return [Row(**{key: value for key, value in each.items() if key != "kept"}) for each in record["rows"]]


def _today(found: Mapping[str, Row]) -> str:
    special = [(name, row) for name, row in found.items() if not name.startswith(_USUAL) and row.value is not None]
    return ", ".join(f"{name.replace('_', ' ')} {row.value:g}" for name, row in special) or "–"


def _latency(found: Mapping[str, Row], kind: str, which: Sequence[str] = ("p50", "p99", "max")) -> str:
    values = [found.get(f"{kind}_{each}_ms") for each in which]
    shown = " / ".join("–" if row is None or row.value is None else f"{row.value:.3g}" for row in values)
    failed = found.get(f"{kind}_failed")
    return shown + (f", {failed.value:g} failed" if failed is not None and failed.value else "")


def _stretch(found: Mapping[str, Row]) -> str:
    row = found.get(STRETCH)
    return "–" if row is None or row.value is None else f"{row.value:.2g}"


def _memory(found: Mapping[str, Row]) -> str:
    values = [found.get(f"{each}_after_mb") for each in ("worker", "master")]
    shown = " / ".join("–" if row is None or row.value is None else f"{row.value:+.0f}" for row in values)
    peak = found.get("worker_peak_mb")
    return shown + (f" (peak {peak.value:+.0f})" if peak is not None and peak.value is not None else "")


def _judged(attack: Attack, variant: str, found: Mapping[str, Row]) -> str:
    judged = variant.partition(",")[0] in attack.transports
    return _verdict(found) if judged else f"not judged: {attack.why_not}"


def _verdict(found: Mapping[str, Row]) -> str:
    missed = []
    for name, row in found.items():
        if row.error:
            missed.append(f"no figure: {row.error}")
        elif row.kept is False:
            sign, limit = (">=", row.least) if row.least is not None else ("<=", row.most)
            missed.append(f"{name} {'missing' if row.value is None else f'{row.value:g}'}, not {sign} {limit:g}")
    return "kept" if not missed else "**missed**: " + "; ".join(missed)
