"""Shows a measurement: an HTML page with charts, or tables in Markdown.

    python -m perf report [FILE…] [-o PAGE]                  write a page of the newest FILE; the others are its history
    python -m perf report --markdown [FILE]                  print its tables
    python -m perf report --readme README.md [FILE]          rewrite its three rows between their markers
    python -m perf report --readme docs/performance.md [FILE]   rewrite its tables between their markers
    python -m perf report --readme PAGE --check [FILE]       fail if what the page shows is not the record's

Without FILE, the records in perf/results are shown. Both pages show the newest full measurement, or the newest
standard one if there is no full one; never a quick one, a selection of scenarios or a comparison.
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
    """Write the page or the tables. Returns 1 if the README is stale, and 2 if a file is not valid."""
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
    given = parser.parse_args(arguments)
    if given.check and not given.readme:
        parser.error("--check goes with --readme")
    try:
        records = _records(given.files)
        if given.readme:
            return _readme(given.readme, records, bool(given.files), given.check)
        if given.markdown:
            print(text.whole(records[-1]), end="")
            return 0
        # Imported here, because Plotly takes a second to load and the tables do not need it.
        from perf.report.page import page

        # A record that holds only the self-test is never the subject of the page, only a part of it.
        # A record with an invalid gate is also excluded, unless the command line names it.
        fit = [record for record in records if record.runs and (given.files or record.valid)]
        subject = fit[-1] if fit else records[-1]
        output = given.output or subject.path.with_suffix(".html")
        output.write_text(page(subject, records), encoding="utf-8")
        print(f"written: {output}")
        return 0
    except (RecordError, OSError) as error:
        print(f"perf report: {error}", file=sys.stderr)
        return 2


def _records(files: Sequence[Path]) -> list[Record]:
    """The records of ``files`` in the order of measurement.

    Raises:
        RecordError: if a file is not a record, or there is none.
    """
    records = sorted((load(path) for path in files), key=lambda record: record.measured) if files else kept()
    if not records:
        raise RecordError(f"no record in {RESULTS.name}/: measure with `python -m perf measure`, or name a file")
    return records


def _shown(page: Path) -> str:
    """The path of the page, relative to the root of the project."""
    return f"docs/{page.name}" if page.resolve().parent.name == "docs" else page.name


def _readme(readme: Path, records: Sequence[Record], named: bool, check: bool) -> int:
    fit = [record for record in records if named or not record.partial]
    if not fit:
        raise RecordError(
            "every stored record is of a quick run, a selection of scenarios or a comparison: name one to use it"
        )
    record = max(fit, key=lambda each: (bool(each.arguments.get("full")), each.measured))
    link = text.link_from(readme, record.path)
    old = readme.read_text(encoding="utf-8")
    new = text.rewritten(old, record, link, readme.name)
    if check:
        if new != old:
            again = f"python -m perf report --readme {_shown(readme)}"
            print(f"{readme.name}: the table is not that of {link}: run `{again}` and commit it", file=sys.stderr)
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    print(f"{readme.name}: {'rewritten' if new != old else 'unchanged'}, from {link}")
    return 0
