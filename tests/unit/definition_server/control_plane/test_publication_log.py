"""The log lines of a publication: the faults of its rows, and the changes that it made."""

from __future__ import annotations

import pytest
from tests.support.logs import LogLines, logged
from tests.support.snapshots import opened, row

from definition_server.catalog.definition import Unserved
from definition_server.catalog.validation import Findings, Suspect
from definition_server.control_plane.publication_log import log_broadcast, log_findings
from definition_server.control_plane.sync_state import ChangeCounts


def test_unserved_and_suspect_rows_are_logged_by_reason_with_examples(logs: LogLines) -> None:
    findings = Findings()
    (unserved, other), suspect = list(Unserved)[:2], next(iter(Suspect))
    findings.unserved[unserved], findings.unserved[other], findings.suspect[suspect] = 3, 1, 2
    findings.examples |= {unserved: ["a", "b"], other: ["c"], suspect: ["d"]}
    log_findings(findings, opened("if"))
    assert [(line["event"], line["reason"], line["count"], line["examples"]) for line in logs] == [
        ("Rows not served", unserved, 3, ["a", "b"]),
        ("Rows not served", other, 1, ["c"]),
        ("Rows look wrong, served as they are", suspect, 2, ["d"]),
    ]
    assert {line["log_level"] for line in logs} == {"warning"}


def test_the_first_publication_counts_all_definitions_as_added(logs: LogLines) -> None:
    snapshot = opened("if", "else", generation=4)
    assert log_broadcast(None, snapshot, 1.23456, None) == ChangeCounts(2, 0, 0, (), 4)
    (line,) = logs
    assert line == {
        "event": "Definitions Broadcasted", "log_level": "info", "count": 2, "duration_ms": 1234.6, "generation": 4,
        "version_hash": snapshot.version_hash, "bytes": snapshot.size, "added": 2, "removed": 0, "changed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("known", [True, False], ids=["names known", "all compared"])
def test_a_publication_logs_up_to_ten_names_of_each_kind_of_change(known: bool, logs: LogLines) -> None:
    added, removed, changed = ([f"{kind}{number:02}" for number in range(11)] for kind in ("a", "r", "c"))
    before = opened(*removed, *changed, "kept")
    after = opened(*added, *(row(name, "new") for name in changed), "kept", generation=2)
    names = [name.encode() for name in (*added, *removed, *changed)] if known else None
    counts = log_broadcast(before, after, 0.0, names)
    assert counts == ChangeCounts(
        11, 11, 11,
        (*(f"+ {name}" for name in added[:10]), *(f"- {name}" for name in removed[:10]),
         *(f"~ {name}" for name in changed[:10])),
        2,
    )  # fmt: skip
    (line,) = logged(logs, "Definitions Broadcasted")
    assert (line["added"], line["removed"], line["changed"], line["count"]) == (11, 11, 11, 23)
    for kind, expected in (("added", added), ("removed", removed), ("changed", changed)):
        assert list(line[f"{kind}_names"]) == expected[:10]


def test_a_publication_without_changes_logs_no_names(logs: LogLines) -> None:
    assert log_broadcast(opened("if"), opened("if", generation=2), 0.0, None) == ChangeCounts(0, 0, 0, (), 2)
    (line,) = logs
    assert not [name for name in line if name.endswith("_names")]
