"""The report of a measurement in a real browser: without a network, in light and dark, wide and narrow, it draws the
figures of the record, and nothing exceeds its frame.
"""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from perf.report.page import page
from perf.report.record import load
from perf.report.text import number
from tests.judges.browser import chromium, inked
from tests.support.perf_record import sample, write

CHARTS = {"per-core", "percentiles", "knee", "cost", "harness", "memory", "history"}
# The script examines the page from inside when all charts are drawn, shows every view, and writes the results into an
# element.
PROBE = """
<script>
const seen = {errors: [], drawn: false, charts: {}, views: 0};
addEventListener("error", event => seen.errors.push(event.message));
addEventListener("unhandledrejection", event => seen.errors.push(String(event.reason)));
const wait = () => document.documentElement.dataset.drawn ? look() : setTimeout(wait, 20);
async function look() {
  seen.drawn = Number(document.documentElement.dataset.drawn);
  for (const chart of document.querySelectorAll(".chart")) {
    const select = document.querySelector(`select[data-for="${chart.id}"]`), views = select ? select.options.length : 1;
    const marks = [];
    for (let view = views - 1; view >= 0; view--) {
      if (select) { select.selectedIndex = view; await draw(chart.id); }
      marks.push(chart.querySelectorAll(".trace.bars .point, .js-line, .points .point, .textpoint").length);
      seen.views++;
    }
    const box = chart.querySelector(".main-svg").getBoundingClientRect();
    const card = chart.parentElement.getBoundingClientRect();
    seen.charts[chart.id] = {
      marks, width: box.width, height: box.height, inside: box.left >= card.left && box.right <= card.right + 1,
      text: chart.textContent,
    };
  }
  const style = getComputedStyle(document.querySelector(".chart .xtick text"));
  seen.tick = style.fill;
  seen.page = getComputedStyle(document.body).backgroundColor;
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.fetched = fetched.filter(name => !name.startsWith("data:"));
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  document.body.append(told);
}
wait();
</script>
"""


def look(tmp_path: Path, html: str, *options: str) -> dict[str, Any]:
    """The results of the probe in the page."""
    path = tmp_path / "page.html"
    path.write_text(html.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    out = chromium(tmp_path, "--dump-dom", *options, path.as_uri())
    found = re.search(r'<pre id="seen">(.*?)</pre>', out, re.DOTALL)
    assert found, f"the charts were not drawn: {re.findall('data-failed=.*?>', out)}"
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("results")
    old = write(folder, sample(seed=2, measured="2026-11-20T10:00:00+00:00", faster=0.9), "old.json")
    return page(load(write(folder)), [load(old)])


@pytest.mark.parametrize("width", [1280, 500])
def test_every_view_of_every_chart_is_drawn_within_the_page(tmp_path: Path, html: str, width: int) -> None:
    seen = look(tmp_path, html, f"--window-size={width},1000")
    hot = load(write(tmp_path)).cells["get-hot", "native"]
    assert seen["errors"] == []
    assert seen["fetched"] == []
    assert seen["drawn"] == len(CHARTS)
    assert set(seen["charts"]) == CHARTS
    assert seen["views"] > 2 * len(CHARTS)
    assert seen["overflow"] <= 0
    for name, chart in seen["charts"].items():
        assert all(chart["marks"]), f"{name} has an empty view"
        assert chart["inside"], name
        assert chart["width"] > width / 3, name
        assert chart["height"] > 100, name
    assert hot.per_core is not None
    for name in ("native", "grpc-js", "nghttpd", number(hot.per_core.median)):
        assert name in seen["charts"]["per-core"]["text"]


def test_dark_mode_changes_page_and_charts(tmp_path: Path, html: str) -> None:
    light = look(tmp_path, html)
    dark = look(tmp_path, html, "--blink-settings=preferredColorScheme=0")
    assert light["page"] != dark["page"]
    assert light["tick"] != dark["tick"]
    assert dark["errors"] == []


def test_script_in_a_record_is_not_executed(tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>"
    told = sample()
    told["title"] = told["commit"] = evil
    for run in told["runs"]:
        if run["server"] == "tonic":
            run["server"] = evil
        run["reason"] = evil
    told["knee"][-1]["reason"] = told["skipped"][0]["why"] = told["gates"][-1]["reason"] = evil
    seen = look(tmp_path, page(load(write(tmp_path, told))))
    assert seen["errors"] == []
    assert seen["fetched"] == []
    assert len(seen["charts"]) == len(CHARTS)


def test_a_screenshot_of_the_page_is_not_blank(tmp_path: Path, html: str) -> None:
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(html, encoding="utf-8")
    chromium(tmp_path, "--window-size=1280,5200", f"--screenshot={picture}", path.as_uri())
    blank = tmp_path / "blank.html"
    blank.write_text("<!DOCTYPE html><title>blank</title>")
    nothing = tmp_path / "blank.png"
    chromium(tmp_path, "--window-size=1280,5200", f"--screenshot={nothing}", blank.as_uri())
    assert inked(picture) > 10 * inked(nothing)


NARROW = """<body style="margin:0"><iframe src="page.html" width="420" height="4000"></iframe><script>
addEventListener("message", event => {
  const told = document.createElement("pre");
  told.id = "seen"; told.textContent = event.data; document.body.append(told);
});
</script>"""
NARROW_PROBE = """
<script>
const wait = () => document.documentElement.dataset.drawn ? look() : setTimeout(wait, 20);
function look() {
  const clipped = [...document.querySelectorAll(".table, td, .mark, section")].filter(
    each => each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).display !== "inline-block");
  const wide = [...document.querySelectorAll("table, tr, td, svg.bullet")].filter(
    each => each.getBoundingClientRect().right > innerWidth);
  parent.postMessage(JSON.stringify({
    width: innerWidth, rows: document.querySelectorAll("tr").length, clipped: clipped.map(each => each.textContent),
    wide: wide.map(each => each.textContent), overflow: document.documentElement.scrollWidth - innerWidth}), "*");
}
wait();
</script>
"""


def test_no_table_is_clipped_at_420_pixels(tmp_path: Path, html: str) -> None:
    (tmp_path / "page.html").write_text(html.replace("</body>", NARROW_PROBE + "</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"  # the browser's own window cannot be that narrow
    frame.write_text(NARROW, encoding="utf-8")
    out = chromium(tmp_path, "--dump-dom", frame.as_uri())
    found = re.search(r'<pre id="seen">(.*?)</pre>', out, re.DOTALL)
    assert found
    seen = json.loads(unescape(found[1]))
    assert seen["width"] == 420
    assert seen["rows"] > 10
    assert (seen["clipped"], seen["wide"], seen["overflow"]) == ([], [], 0)
