"""Shows a measurement: an HTML page with charts, or tables in Markdown.

    python -m perf report [FILE…] [-o PAGE]                  a page about the newest FILE; the others are its history
    python -m perf report --markdown [FILE]                  its tables
    python -m perf report --readme README.md [FILE]          rewrite the README's table between its markers
    python -m perf report --readme README.md --check [FILE]  fail if that table is not the record's

Without FILE: the records in perf/results. For the README: the newest full measurement, or the newest standard one if
there is no full one; never a quick one, a choice of scenarios or a comparison.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.results import RESULTS

from perf.report import text
from perf.report.record import Record, RecordError, kept, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what is asked for. 1: the README is stale. 2: a file is not what it should be."""
    parser = argparse.ArgumentParser(
        prog="python -m perf report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="*", type=Path, help="records that `python -m perf measure` wrote"
    )
    parser.add_argument("-o", "--output", metavar="PAGE", type=Path, help="default: beside the record, with .html")
    parser.add_argument("--markdown", action="store_true", help="print tables")
    parser.add_argument("--readme", metavar="README", type=Path, help="rewrite the table in this file")
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, fail if it is stale")
    told = parser.parse_args(arguments)
    if told.check and not told.readme:
        parser.error("--check goes with --readme")
    try:
        records = _records(told.files)
        if told.readme:
            return _readme(told.readme, records, bool(told.files), told.check)
        if told.markdown:
            print(text.whole(records[-1]), end="")
            return 0
        # Plotly takes a second to load, which the tables do not need.
        from perf.report.page import page

        # A record of the self-test alone is a part of the page, not its subject.
        subject = next((record for record in reversed(records) if record.runs), records[-1])
        output = told.output or subject.path.with_suffix(".html")
        output.write_text(page(subject, records), encoding="utf-8")
        print(f"written: {output}")
        return 0
    except (RecordError, OSError) as error:
        print(f"perf report: {error}", file=sys.stderr)
        return 2


def _records(files: Sequence[Path]) -> list[Record]:
    """In the order of measurement.

    Raises:
        RecordError: where a file is no record, or there is none.
    """
    records = sorted((load(path) for path in files), key=lambda record: record.measured) if files else kept()
    if not records:
        raise RecordError(f"no record in {RESULTS.name}/: measure with `python -m perf measure`, or name a file")
    return records


def _readme(readme: Path, records: Sequence[Record], named: bool, check: bool) -> int:
    fit = [record for record in records if named or not record.partial]
    if not fit:
        raise RecordError(
            "every kept record is of a quick run, a choice of scenarios or a comparison: name one to use it"
        )
    record = max(fit, key=lambda each: (bool(each.arguments.get("full")), each.measured))
    link = text.link_from(readme, record.path)
    old = readme.read_text(encoding="utf-8")
    new = text.rewritten(old, text.readme(record, link), readme.name)
    if check:
        if new != old:
            again = f"python -m perf report --readme {readme.name}"
            print(f"{readme.name}: the table is not that of {link}: run `{again}` and commit", file=sys.stderr)
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    print(f"{readme.name}: {'rewritten' if new != old else 'unchanged'}, from {link}")
    return 0
