"""The table of docs/operations.md about the platform's operations guide is complete, and its tests exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
TABLE = re.search(r"<!-- guide -->\n(.*?)<!-- /guide -->", PAGE, re.DOTALL)
assert TABLE
ROWS = [[cell.strip() for cell in line.split(" | ")] for line in TABLE[1].splitlines()[2:]]
ASKED = (
    "99.99 %", "P95", "Docker Swarm", "`DATABASE_POOL_SIZE`", "`DATABASE_URL`", "`API_KEY`", "`PORT`",
    "`UV_THREADPOOL_SIZE`", "`NODE_ENV`", "35,000", "`nofile`", "keepalive", "requests equal limits", "pinning", "20 %",
    "NOT_SERVING", "`avap_cache_size < 100`", '`avap_requests_total{status="401"}`',
    "`kube_pod_container_status_restarts_total > 0`", "`FATAL`", "`Definitions Broadcasted`", "60 s",
    "`kubectl rollout restart deployment avap-engine`",
)  # fmt: skip
"""The names in the guide."""
FLAGS = ("--max-old-space-size", "--min-semi-space-size", "--no-lazy", "--expose-gc")


@pytest.mark.parametrize("asked", ASKED)
def test_everything_that_the_guide_names_is_in_the_table(asked: str) -> None:
    assert any(asked in row[1] for row in ROWS)


def test_every_row_names_its_place_in_the_project_and_an_existing_test() -> None:
    assert {row[0].lstrip("| ") for row in ROWS} == {"Title", *"123456"}
    for row in ROWS:
        assert len(row) == 4, row
        assert row[2]
        file, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)` \|", row[3]).groups()
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), row


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_of_the_guide_has_its_counterpart_by_name(flag: str) -> None:
    assert any(flag in row[1] for row in ROWS)
    page = (ROOT / "docs/runtime-flags.md").read_text(encoding="utf-8")
    [row] = [line for line in page.splitlines() if line.startswith("| ") and f"`{flag}" in line]
    heading = re.search(r"\]\(#([\w-]+)\)", row)
    assert heading
    titles = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert heading[1] in {title.lower().replace(" ", "-") for title in titles}
