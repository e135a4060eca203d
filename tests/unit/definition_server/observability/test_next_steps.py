"""The next steps on the page: each fault has a step with a link to an existing page, and without a fault there is
none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.fakes import service_status
from tests.support.pages import broken_links

from definition_server.observability.next_steps import BY_REASON, Urgency, next_steps
from definition_server.observability.reasons import Reason
from definition_server.observability.status import FreshnessStatus, RestartStatus, ServiceStatus, WorkerStatus

DOCS = Path(__file__).parents[4] / "docs"
NOW = 1_700_000_100.0
HELD = {"held_reason": Reason.CATALOGUE_SHRUNK, "held_version": "cd" * 32, "last_error": Reason.CATALOGUE_SHRUNK}


def with_sync(**changes: Any) -> ServiceStatus:
    status = service_status()
    return replace(status, sync=replace(status.sync, **{"store": "stored", **changes}))


GOOD = with_sync()
UNREADABLE = with_sync(last_error=Reason.DATABASE_REFUSED_LOGIN)
CRASHING = WorkerStatus(0, None, "down", 0, "", 0, None, 9, True)


def test_a_server_without_faults_has_no_next_step() -> None:
    assert next_steps(GOOD, NOW) == []


@pytest.mark.parametrize(
    ("status", "urgency", "words"),
    [
        (replace(GOOD, ready=False, catalog=None), Urgency.BAD, "No catalogue"),
        (replace(UNREADABLE, ready=False, catalog=None), Urgency.BAD, "refuses the login"),
        (replace(GOOD, ready=False, full=True), Urgency.BAD, "MAX_CONNECTIONS"),
        (replace(GOOD, ready=False), Urgency.BAD, "No worker serves"),
        (replace(GOOD, ready=False, stopping=True), Urgency.NOTE, "shuts down"),
        (replace(GOOD, restart=RestartStatus(False, "no_source")), Urgency.WARN, "Do not restart"),
        (UNREADABLE, Urgency.WARN, "refuses the login"),
        (replace(GOOD, freshness=FreshnessStatus(False, "check_late")), Urgency.WARN, "out of date"),
        (with_sync(**HELD), Urgency.WARN, "`definition-server accept cdcdcdcdcdcdcdcd`"),
        (with_sync(**HELD), Urgency.WARN, "`definition-server diff abababababababab cdcdcdcdcdcdcdcd`"),
        (with_sync(store_error=Reason.DISK_FAILED), Urgency.WARN, "The disk fails"),
        (with_sync(pinned="command"), Urgency.NOTE, "`definition-server unpin`"),
        (with_sync(pinned="policy"), Urgency.NOTE, "PUBLICATION_POLICY"),
        (with_sync(pinned="command", pinned_missing=True), Urgency.WARN, "not known here"),
        (with_sync(rows_held={"code_invalid": 1200}), Urgency.WARN, "1,200"),
        (with_sync(unserved={"duplicate": 3}), Urgency.WARN, "Rows not served: 3"),
        (replace(GOOD, workers=(CRASHING,)), Urgency.BAD, "again and again"),
        (replace(GOOD, workers=(replace(CRASHING, crash_loop=False),)), Urgency.WARN, "A worker is down"),
        (replace(GOOD, certificates_expire={"server": NOW - 1}), Urgency.BAD, "`server` has expired"),
        (replace(GOOD, certificates_expire={"server": NOW + 86_400}), Urgency.WARN, "`server` expires soon"),
        (with_sync(store="off"), Urgency.NOTE, "SNAPSHOT_DIR"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_each_fault_has_a_step_with_its_urgency_and_a_page(status: ServiceStatus, urgency: Urgency, words: str) -> None:
    (step,) = (step for step in next_steps(status, NOW) if words in step.text)
    assert step.urgency is urgency
    assert (DOCS / step.page.partition("#")[0]).exists()


@pytest.mark.parametrize("reason", [Reason.DATABASE_UNREACHABLE, Reason.PERMISSION_DENIED, Reason.TABLE_MISSING])
def test_a_fault_of_the_database_has_its_own_step_before_that_of_a_held_catalogue(reason: Reason) -> None:
    both = [step.text for step in next_steps(with_sync(**HELD | {"last_error": reason}), NOW)]
    assert both[0] == BY_REASON[reason][0]
    assert "definition-server accept" in both[1]
    assert len(next_steps(with_sync(**HELD), NOW)) == 1


def test_the_most_urgent_step_comes_first() -> None:
    status = replace(with_sync(pinned="command", rows_held={"code_invalid": 1}), ready=False, catalog=None)
    assert [step.urgency for step in next_steps(status, NOW)] == [Urgency.BAD, Urgency.WARN, Urgency.NOTE]


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_has_a_step_on_the_page_that_the_documentation_names(reason: Reason) -> None:
    text, page = BY_REASON[reason]
    assert text.endswith(".")
    listed = (DOCS / "observability.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| (?:`\w+`, )?`{reason}`.*\| (.+) \|$", listed, re.MULTILINE)
    (target,) = re.findall(r"\]\(([^)]+)\)", row)
    assert page in (target, f"observability.md{target}")


def test_every_page_and_section_that_a_step_names_exists(tmp_path: Path) -> None:
    links = tmp_path / "links.md"
    pages = {page for _, page in BY_REASON.values()} | {"observability.md#safe-to-restart", "observability.md#d-rows"}
    links.write_text("".join(f"[x]({DOCS / page})\n" for page in pages), encoding="utf-8")
    assert broken_links(links) == []
