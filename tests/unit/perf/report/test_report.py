"""The report of a measurement: it shows the record's figures, marks invalid ones, and renders the README's tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from perf.report import command as report
from perf.report import text
from perf.report.block import marks
from perf.report.charts import PERCENTILES, Chart, all_charts
from perf.report.page import BULLET_WIDTH, bullet, figures_json, page
from perf.report.record import Cell, Gate, Record, RecordError, Run, kept, load
from tests.support import families, perf_record
from tests.support.perf_record import FALLEN, histogram, sample, write

BEGIN, END = marks(text.ALL)
pytestmark = pytest.mark.slow

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return load(write(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def html(record: Record) -> str:
    return page(record)


@pytest.fixture(scope="module")
def charts(record: Record) -> dict[str, Chart]:
    return all_charts(record, [record])


def small() -> dict[str, Any]:
    """A record with one run, whose page is quickly made."""
    told = sample()
    return told | {"runs": told["runs"][:1], "knee": [], "memory": []}


def one_run(**values: Any) -> Run:
    return Run(**{"scenario": "rated", "server": "native", "kind": "open", "valid": True} | values)


# Reading.


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda record: record.pop("schema"), "schema 1 expected, none found"),
        (lambda record: record.update(schema=2), "schema 1 expected, 2 found"),
        (lambda record: record.pop("runs"), "runs: Field required"),
        (lambda record: record["runs"][3].pop("server"), "runs.3.server: Field required"),
        (lambda record: record["runs"][0].update(rate="fast"), "runs.0.rate: .*number"),
        (lambda record: record["runs"][0].update(rate=float("nan")), "runs.0.rate: .*finite"),
        (lambda record: record["knee"][1].pop("offered_rate"), "knee.1.offered_rate: Field required"),
    ],
)
def test_a_file_that_is_not_a_record_is_refused_with_fault_and_place(tmp_path: Path, change: Change, told: str) -> None:
    damaged = sample()
    change(damaged)
    with pytest.raises(RecordError, match=told):
        load(write(tmp_path, damaged))


@pytest.mark.parametrize("octets", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_octets_that_are_not_a_json_object_are_refused(tmp_path: Path, octets: bytes) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(octets)
    with pytest.raises(RecordError, match=r"some\.json"):
        load(path)


def test_stored_records_are_listed_oldest_first_without_files_of_other_measurements(tmp_path: Path) -> None:
    write(tmp_path, sample(measured="2026-11-25T10:00:00+00:00"), "a.json")
    write(tmp_path, sample(measured="2026-11-20T10:00:00+00:00"), "b.json")
    (tmp_path / "other.json").write_text('{"title": "native transport", "rows": []}')
    assert [each.path.name for each in kept(tmp_path)] == ["b.json", "a.json"]


@pytest.mark.thorough  # takes seconds
@pytest.mark.parametrize("which", families.sample([slice(-1, None), slice(None, -1)]), ids=["newest", "older"])
def test_every_record_of_the_project_can_be_shown(which: slice) -> None:
    for each in kept()[which]:
        assert page(each)
        assert text.whole(each)


# Combining runs.


def test_figures_are_medians_of_only_the_valid_runs() -> None:
    rates = [100.0, 300.0, 200.0]
    runs = [one_run(per_server_cpu_second=rate, latency={"p95": rate / 100}) for rate in rates]
    cell = Cell([*runs, one_run(valid=False, reason="late", per_server_cpu_second=9e9, latency={"p95": 0.0})], "x")
    assert cell.per_core is not None
    assert cell.per_core.median == 200
    assert cell.latency("p95") == 2
    assert cell.reason == ""


def test_a_cell_without_a_valid_run_has_a_reason_and_no_figure() -> None:
    cell = Cell([one_run(valid=False, reason="no answer", per_server_cpu_second=5.0)], "x")
    assert (cell.per_core, cell.latency("p95"), cell.reason) == (None, None, "no answer")
    assert cell.curve(PERCENTILES) == []


def test_runs_of_a_load_that_rises_in_steps_are_not_combined() -> None:
    steps = [one_run(offered_rate=rate, rate=rate, per_server_cpu_second=rate) for rate in (10.0, 20.0, 30.0)]
    closed = one_run(offered_rate=None, kind="closed", per_server_cpu_second=25.0)
    for runs, expected in (([*steps, closed], 25), (steps, 30)):
        cell = Cell(runs, "x")
        assert cell.in_steps
        assert cell.per_core is not None
        assert cell.per_core.median == expected


def test_runs_of_one_load_are_combined_even_if_their_offered_rates_differ_a_little() -> None:
    offered = [8766.0047, 8766.0061, 8766.0037, 8766.0062, 8766.0001]
    latencies = [0.1235, 0.095, 0.0941, 0.1962, 0.1903]
    pairs = zip(offered, latencies, strict=True)
    cell = Cell([one_run(offered_rate=rate, latency={"p95": ms}, rate=rate) for rate, ms in pairs], "x")
    assert not cell.in_steps
    assert cell.latency("p95") == 0.1235


def test_the_page_and_a_gate_have_one_value_for_one_figure() -> None:
    newest = [each for each in kept() if each.gates and not each.partial][-1]
    checked = 0
    for gate in newest.gates:
        if gate.value is None or gate.verdict == "invalid":
            continue
        cell = newest.cells[gate.scenario, "native"]
        if gate.unit == "ms":
            assert cell.latency("p95") == pytest.approx(gate.value), gate.gate
        elif gate.unit == "calls/s" and cell.per_core is not None:
            assert cell.per_core.median == pytest.approx(gate.value), gate.gate
        elif gate.gate.startswith("native ÷ grpcio"):
            assert newest.times(gate.scenario, "grpcio") == gate.value
        checked += 1
    assert checked > 8


def test_the_page_is_small_and_repeats_no_paragraph(record: Record, html: str) -> None:
    assert len(html.encode()) < 2_500_000
    visible = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    paragraphs = list(re.findall(r"<(?:p|li|small)[^>]*>([^<]{60,})<", visible))
    titles = {text for text in paragraphs if any(text == scenario.title for scenario in record.scenarios.values())}
    assert [each for each in set(paragraphs) - titles if paragraphs.count(each) > 1] == []


@pytest.mark.thorough  # draws charts
def test_a_record_with_an_invalid_gate_is_not_shown_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path, small() | {"gates": []}, "good.json")
    spoilt = small() | {"gates": [{"gate": "x", "verdict": "invalid"}], "measured": "2027-01-01T00:00:00+00:00"}
    bad = write(tmp_path, spoilt, "bad.json")
    monkeypatch.setattr(report, "kept", lambda: kept(tmp_path))
    assert run_report() == 0
    assert str(good.with_suffix(".html")) in capsys.readouterr().out
    assert run_report(bad, good) == 0
    assert str(bad.with_suffix(".html")) in capsys.readouterr().out


@pytest.mark.parametrize(("unit", "per_ms"), [("ns", 1), ("µs", 1000)])
def test_a_curve_is_in_milliseconds_for_every_unit_of_the_histogram(unit: str, per_ms: int) -> None:
    encoded = histogram(2.0, 0.0)
    cell = Cell([one_run(histogram=encoded, histogram_unit=unit)] * 2, "x")
    curve = dict(cell.curve([0, 50, 99]))
    assert curve[50] == pytest.approx(2.0 * per_ms, rel=0.01)


def test_a_curve_ends_at_the_highest_percentile_with_enough_answers() -> None:
    curve = Cell([one_run(histogram=histogram(1.0, 0.1, count=100))], "x").curve(PERCENTILES)
    assert curve[-1][0] == pytest.approx(99)
    assert [percentile for percentile, _ in curve] == sorted(percentile for percentile, _ in curve)


@pytest.mark.parametrize("encoded", ["x", "HISTFAAAAA==", "HISTFAAAABx4nJNpmSzMwMDAxQAhAAA=", "é"])
def test_a_histogram_that_cannot_be_decoded_is_refused_with_its_place(encoded: str) -> None:
    with pytest.raises(RecordError, match=r"some\.json: rated, native: a histogram cannot be decoded"):
        Cell([one_run(histogram=encoded)], "some.json").curve([50])


def test_a_histogram_of_an_unknown_unit_is_refused() -> None:
    with pytest.raises(RecordError, match="histogram_unit 'fortnights'"):
        Cell([one_run(histogram="x", histogram_unit="fortnights")], "some.json").curve([50])


# Text.


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (546_123, "546,000"), (27.49, "27.5"), (0.3124, "0.312"), (999.9, "1,000"), (9.996, "10.0"),
     (-3.2, "-3.20"), (1234, "1,230")],
)  # fmt: skip
def test_numbers_have_three_significant_figures(value: float | None, shown: str) -> None:
    assert text.number(value) == shown


def test_a_limit_is_shown_with_all_of_its_digits() -> None:
    assert text.bound(Gate(gate="x", verdict="kept", limit=25_023)) == "≥ 25,023"
    assert text.bound(Gate(gate="x", verdict="kept", limit=0.005, bound="most")) == "≤ 0.005"


def test_tables_hold_every_scenario_and_server_and_mark_invalid_cells(record: Record) -> None:
    lines = text.rates(record).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["scenario", *record.servers]
    rows = {line.split("|")[1].strip(): line.strip("|").split("|") for line in lines[2:]}
    assert set(rows) == set(record.measured_scenarios)
    column = 1 + record.servers.index(FALLEN)
    assert rows["get-missing"][column].strip() == "**invalid**"
    assert rows["saturate"][column].strip() == "–"


def test_the_kernels_share_is_the_time_of_all_valid_runs_that_is_not_user_time() -> None:
    spent = ((1.0, 0.9), (3.0, 1.1), (None, 9.0), (5.0, None))
    runs = [one_run(server_cpu_seconds=whole, server_user_seconds=user) for whole, user in spent]
    cell = Cell([*runs, one_run(valid=False, server_cpu_seconds=9.0, server_user_seconds=0.0)], "x")
    assert cell.kernel_share == pytest.approx(0.5)
    assert Cell([one_run()], "x").kernel_share is None


def test_latencies_are_shown_for_open_loops(record: Record) -> None:
    assert text.scheduled(record) == ["rated", "upstream-stress"]


def test_text_of_a_record_cannot_end_a_cell_or_a_line(record: Record) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", text.whole(record), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert perf_record.WHY_FALLEN.replace("|", "\\|") in "\n".join(text.notes(record))


def test_markdown_has_all_tables(record: Record) -> None:
    shown = text.whole(record)
    for heading in (
        "Answers per second",
        "P95, ms",
        "The kernel's share",
        "Gates",
        "Knee",
        "Memory",
        "Cost of the harness",
        "Self-test",
    ):
        assert re.search(rf"^## {heading}", shown, re.MULTILINE), heading
    assert "**missed**: the median and its whole interval lie beyond" in shown
    assert "grpc-java: not measured: mvn is not installed" in shown


# The README.


def readme(folder: Path, body: str = "typed\n") -> Path:
    path = folder / "README.md"
    path.write_text(f"# Title\n\n{BEGIN}\n{body}{END}\n\nEnd.\n", encoding="utf-8")
    return path


def run_report(*arguments: object) -> int:
    return report.main([str(each) for each in arguments])


def test_a_rewritten_readme_is_not_stale(tmp_path: Path) -> None:
    path, file = readme(tmp_path), write(tmp_path)
    assert run_report("--readme", path, file) == 0
    written = path.read_text()
    assert written.startswith(f"# Title\n\n{BEGIN}\n")
    assert written.endswith(f"{END}\n\nEnd.\n")
    assert "typed" not in written
    assert f"({file.name})" in written
    assert run_report("--readme", path, "--check", file) == 0
    assert run_report("--readme", path, file) == 0
    assert path.read_text() == written


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_the_projects_own_pages_show_the_stored_record(page: str) -> None:
    assert run_report("--readme", Path(__file__).parents[4] / page, "--check") == 0


def test_the_readme_has_three_rows_and_the_latency_of_the_rated_load(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "README.md"
    path.write_text("<!-- perf summary -->\nold\n<!-- /perf summary -->\n", encoding="utf-8")
    assert run_report("--readme", path, write(tmp_path)) == 0
    written = path.read_text()
    assert (
        len([line for line in written.splitlines() if line.startswith("| ")]) == 2 + 2
    )  # the sample has no one-by-one
    assert f"native: {text.number(record.cells['rated', 'native'].latency('p95'))} ms" in written
    assert "old" not in written
    assert f"Measured {record.measured[:10]}, " in written
    assert f", commit {record.commit.removesuffix('+')}" in written


@pytest.mark.parametrize(
    ("commit", "words"),
    [
        ("abc123", "commit abc123 ("),
        ("abc123+", "commit abc123 with changes that were not committed ("),
        ("", "commit unknown ("),
    ],
)
def test_the_readme_names_the_commit_that_was_measured(record: Record, commit: str, words: str) -> None:
    assert words in text.brief(record.model_copy(update={"commit": commit}), "x.json")


def test_a_page_in_docs_links_a_record_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    assert text.link_from(tmp_path / "docs/page.md", tmp_path / "perf/x.json") == "../perf/x.json"
    assert text.link_from(tmp_path / "README.md", tmp_path / "perf/x.json") == "perf/x.json"


@pytest.mark.parametrize(
    "edit", [("| get-hot |", "| get-hot | 9"), ("3 of 5 gates", "5 of 5 gates"), (END, f"more\n{END}")]
)
def test_an_edited_readme_is_stale_and_check_does_not_change_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: tuple[str, str]
) -> None:
    path, file = readme(tmp_path), write(tmp_path)
    run_report("--readme", path, file)
    assert edit[0] in path.read_text()
    path.write_text(path.read_text().replace(*edit))
    before = path.read_text()
    assert run_report("--readme", path, "--check", file) == 1
    assert path.read_text() == before
    assert "python -m perf report --readme README.md" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["", BEGIN, f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n" * 2])
def test_a_readme_without_its_markers_is_refused_and_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    path = tmp_path / "README.md"
    path.write_text(broken)
    assert run_report("--readme", path, write(tmp_path)) == 2
    assert path.read_text() == broken
    assert BEGIN in capsys.readouterr().err


def test_the_readme_shows_the_newest_full_record_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "kept", lambda: kept(tmp_path))
    path = readme(tmp_path)
    assert run_report("--readme", path) == 2
    partial = ({"quick": True}, {"only": ["x"]}, {"against": "main"}, {"servers": "native"})
    for day, arguments in enumerate(({"full": True}, {"full": True}, {}, *partial), start=1):
        write(tmp_path, sample(measured=f"2026-11-0{day}T10:00:00+00:00") | {"arguments": arguments}, f"{day}.json")
    alone = sample(measured="2026-11-08T10:00:00+00:00") | {"arguments": {"full": True}, "runs": []}
    write(tmp_path, alone, "8.json")
    assert run_report("--readme", path) == 0
    assert "[record](2.json)" in path.read_text()
    assert "from 2.json" in capsys.readouterr().out


# The page.


class Outline(HTMLParser):
    """The references of the page, and the ids of its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.references += [value for name in ("src", "href", "data", "srcset") if (value := told.get(name))]
        if identity := told.get("id"):
            self.ids.append(identity)


def figures(html: str) -> dict[str, list[dict[str, Any]]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    assert found
    read: dict[str, list[dict[str, Any]]] = json.loads(found[1])
    return read


def test_the_page_refers_to_no_other_resource(html: str) -> None:
    outline = Outline(html)
    assert outline.references
    for reference in outline.references:
        assert reference == "data:," if not reference.startswith("#") else reference[1:] in outline.ids


def test_the_page_has_all_its_charts(html: str) -> None:
    names = {"per-core", "percentiles", "knee", "cost", "harness", "memory", "history"}
    assert set(figures(html)) == names
    assert names <= set(Outline(html).ids)


def test_text_of_a_record_does_not_become_markup(html: str) -> None:
    assert "<b>INTERNAL</b>" not in html
    assert html.count("&lt;b&gt;INTERNAL") >= 2


@pytest.mark.thorough  # draws charts
def test_text_of_a_record_cannot_end_the_script(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    told = sample()
    told["runs"][0]["server"] = told["knee"][0]["server"] = told["commit"] = evil
    html = page(load(write(tmp_path, told)))
    assert evil not in html
    assert set(figures(html)) >= {"per-core", "knee"}


def test_the_figures_json_cannot_end_a_script() -> None:
    octets = figures_json({"x": Chart("x", "", {"view": {"text": "</script><!--\u2028"}})})
    assert not set("<\u2028") & set(octets)
    assert json.loads(octets) == {"x": [{"text": "</script><!--\u2028"}]}


def test_an_invalid_cell_has_its_reason_instead_of_a_bar(charts: dict[str, Chart]) -> None:
    figure = charts["per-core"].views["get-missing: unknown names"]
    bars = {trace["y"][0] for trace in figure["data"] if trace["type"] == "bar"}
    assert FALLEN not in bars
    assert "native" in bars
    assert [note["y"] for note in figure["layout"]["annotations"]] == [FALLEN]
    assert "invalid: it answered &lt;b&gt;" in figure["layout"]["annotations"][0]["text"]


def test_an_invalid_point_of_the_knee_is_not_on_a_curve(charts: dict[str, Chart]) -> None:
    traces = {trace.get("name"): trace for trace in charts["knee"].views["native"]["data"]}
    assert list(traces["invalid"]["x"]) == [500_000]
    assert 500_000 not in traces["P95"]["x"]
    assert 500_000 not in traces["answered"]["x"]


@pytest.mark.thorough  # draws charts
def test_history_has_a_line_for_each_machine(tmp_path: Path) -> None:
    other = sample(measured="2026-11-20T10:00:00+00:00")
    other["machine"]["cpus"] = 64
    records = [load(write(tmp_path, each, f"{number}.json")) for number, each in enumerate((other, sample(), sample()))]
    traces = all_charts(records[-1], records)["history"].views["get-hot: one definition"]["data"]
    assert [len(trace["x"]) for trace in traces if trace["name"] == "native"] == [1, 2]


def test_the_verdict_names_the_gates_that_are_not_kept(html: str) -> None:
    assert "3 of 5 gates are kept, 1 missed, 1 invalid: calls per core over TLS; calls per core, wrong keys." in html


@pytest.mark.parametrize(
    ("gate", "kind"), [([], "none"), (["kept"], "kept"), (["kept", "missed"], "missed"), (["kept", "odd"], "invalid")]
)
def test_only_kept_gates_give_a_kept_verdict(tmp_path: Path, gate: list[str], kind: str) -> None:
    told = small() | {"gates": [{"gate": "g", "verdict": verdict} for verdict in gate]}
    assert f'<div class="verdict {kind}">' in page(load(write(tmp_path, told)))


def test_a_witness_that_disagrees_is_marked_as_missed(html: str) -> None:
    marks = dict(re.findall(r'<span class="mark (\w+)">(agrees|explained|disagrees)</span>', html))
    assert marks == {"kept": "agrees", "invalid": "explained", "missed": "disagrees"}


def test_a_record_with_only_invalid_runs_can_be_shown(tmp_path: Path) -> None:
    runs = [{"scenario": "rated", "server": "native", "kind": "open", "valid": False, "reason": "connection refused"}]
    told = {"schema": 1, "measured": "2026-11-25T10:00:00+00:00", "runs": runs}
    record = load(write(tmp_path, told))
    assert "connection refused" in page(record)
    assert "rated on native: invalid: connection refused" in text.whole(record)


@pytest.mark.thorough  # draws charts
def test_a_missing_self_test_is_taken_from_another_record_of_the_same_machine(tmp_path: Path) -> None:
    proof = load(write(tmp_path, sample() | {"runs": []}, "proof.json"))
    bare = small() | {"selftest": None, "witnesses": []}
    assert "Do the gates detect a slower server?" not in page(load(write(tmp_path, bare, "bare.json")))
    assert "Do the gates detect a slower server?" in page(load(tmp_path / "bare.json"), [proof])
    foreign = sample() | {"runs": [], "machine": {"cpu": "another", "cpus": 64}}
    assert "Do the gates detect a slower server?" not in page(
        load(tmp_path / "bare.json"), [load(write(tmp_path, foreign, "foreign.json"))]
    )


@pytest.mark.parametrize("bound", ["least", "most"])
@pytest.mark.parametrize("limit", [50.0, 100.0, 150.0])
def test_the_drawing_of_a_gate_shades_the_side_that_is_kept(bound: str, limit: float) -> None:
    drawn_at = 100.0
    drawn = bullet(Gate(gate="x", verdict="kept", value=drawn_at, low=95, high=104, limit=limit, bound=bound))
    assert drawn is not None
    shaded = drawn["fine_from"] <= drawn["value"] <= drawn["fine_from"] + drawn["fine_width"]
    assert shaded == (limit <= drawn_at if bound == "least" else limit >= drawn_at)
    assert 0 <= drawn["low"] <= drawn["value"] <= drawn["high"] <= BULLET_WIDTH


def test_a_gate_without_a_value_has_no_drawing() -> None:
    assert bullet(Gate(gate="x", verdict="invalid", limit=1)) is None


# The command line.


@pytest.mark.thorough  # draws charts
def test_the_page_is_written_to_the_folder_of_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    assert run_report(file) == 0
    assert file.with_suffix(".html").read_text().startswith("<!DOCTYPE html>")
    assert str(file.with_suffix(".html")) in capsys.readouterr().out


def test_markdown_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    assert run_report("--markdown", file) == 0
    assert capsys.readouterr().out == text.whole(load(file))


def test_a_missing_file_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_report(tmp_path / "nothing.json") == 2
    told = capsys.readouterr().err
    assert told.startswith("perf report: ")
    assert told.count("\n") == 1
