"""The gate: bad rows are held at the last good version of their command or left out, and everything else is served.

`review` judges in this process; `test_row_gate` and `test_checker` test how the server does it.
"""

from __future__ import annotations

from random import Random
from time import thread_time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.gate import refresh

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.content_check import Flaw, flaws_of
from definition_server.catalog.definition import Row, Unserved
from definition_server.catalog.gate import Change, Gate, Held, Review
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.catalog.validation import Suspect

SIGNER = Signer("key")


def row(name: str, code: str | None = "pass", interface: str = "[]", number: int = 1) -> Row:
    return Row(number, name.encode(), b"function", interface.encode(), None if code is None else code.encode())


class Bench:
    """A gate, and the catalogue that passed last."""

    def __init__(self, code: str = "module", interface: str = "on", signer: Signer | None = None) -> None:
        self.gate = Gate(code, interface)
        self.signer = signer
        self.last: Snapshot | None = None
        self.judged: list[bytes] = []
        self.now = 100.0

    def read(self, *rows: Row, judging: bool = True) -> Change:
        """Pass a reading through the gate. If ``judging`` is false, no checker can be started."""
        builder = SnapshotBuilder(self.signer, self.gate.served)
        builder.add(rows)
        review = Review(self.gate, builder, self.last)
        review.find_changed()
        if judging:
            for name, facts, key in review.unjudged():
                self.judged.append(name)
                flaws = flaws_of(self.gate.checks, name, facts.interface, facts.code)
                self.gate.remember(key, flaws)
                review.note(name, flaws)
            for name, facts, _ in review.doubtful():
                review.note_last(name, flaws_of(self.gate.checks, name, facts.interface, facts.code))
        change = review.settle(self.now)
        self.findings = builder.findings
        self.last = Snapshot(builder.build(generation=1, created_at_ns=0).to_bytes())
        return change

    @property
    def codes(self) -> dict[str, str]:
        """Name → code of the catalogue, as a strict client reads it."""
        assert self.last is not None
        return refresh(self.last)


def test_one_bad_row_is_held_and_ten_changed_ones_advance() -> None:
    bench = Bench()
    bench.read(*(row(f"c{n}") for n in range(189)))
    before = bench.last
    assert before is not None
    changed = [row(f"c{n}", f"new = {n}") for n in range(10)]
    change = bench.read(*changed, row("c10", "if"), *(row(f"c{n}") for n in range(11, 189)))
    assert [bench.codes[f"c{n}"] for n in range(10)] == [f"new = {n}" for n in range(10)]
    assert bench.last is not None
    assert bench.last.answer(b"c10") == before.answer(b"c10")
    (held,) = change.held
    assert (held.name, held.reason, held.since) == ("c10", Unserved.CODE_INVALID, 100.0)
    assert held.hash_served != held.hash_refused != ""
    assert bench.findings.held == {Unserved.CODE_INVALID: 1}
    assert not bench.findings.unserved


def test_a_held_row_is_reported_once_and_keeps_its_time_while_it_is_unchanged() -> None:
    bench = Bench()
    bench.read(row("a"), row("b"))
    bench.read(row("a", "if"), row("b"))
    bench.now = 200.0
    assert bench.read(row("a", "if"), row("b", "other = 1")).held == ()
    assert bench.gate.held[b"a"].since == 100.0
    (held,) = bench.read(row("a", "else"), row("b", "other = 1")).held
    assert held.since == 200.0
    (held,) = bench.read(row("a", None), row("b", "other = 1")).held
    assert (held.reason, held.hash_refused) == (Unserved.NULL_CODE, "")
    assert bench.codes == {"a": "pass", "b": "other = 1"}


def test_a_mended_row_is_served_and_reported() -> None:
    bench = Bench()
    bench.read(row("a"))
    bench.read(row("a", "if"))
    change = bench.read(row("a", "mended = 1"))
    assert bench.codes == {"a": "mended = 1"}
    assert (change.held, change.released, change.left_out) == ((), ("a",), ())
    assert not bench.findings.held


def test_a_bad_row_without_a_good_version_is_left_out_and_served_once_it_is_good() -> None:
    bench = Bench()
    bench.read(row("a"))
    change = bench.read(row("a"), row("b", "if"), row("c", interface="{}"))
    assert change.left_out == (("b", Unserved.CODE_INVALID), ("c", Unserved.INTERFACE_INVALID))
    assert bench.findings.unserved == {Unserved.CODE_INVALID: 1, Unserved.INTERFACE_INVALID: 1}
    assert bench.codes.keys() == {"a"}
    assert bench.read(row("a"), row("b", "if"), row("c", interface="{}")).left_out == ()
    bench.read(row("a"), row("b"), row("c"))
    assert bench.codes.keys() == {"a", "b", "c"}


def test_a_row_that_vanished_is_not_held() -> None:
    bench = Bench()
    bench.read(row("a"), row("b"))
    bench.read(row("a"), row("b", "if"))
    assert bench.read(row("a")).released == ("b",)
    assert bench.codes.keys() == {"a"}
    assert bench.read(row("a"), row("b", "if")).left_out == (("b", Unserved.CODE_INVALID),)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row("a", None), Unserved.NULL_CODE),
        (row("a")._replace(code=b"\xff"), Unserved.INVALID_ENCODING),
        (row("a")._replace(interface=b"\xff"), Unserved.INVALID_ENCODING),
        (row("a")._replace(code=None, fault=Unserved.TOO_LARGE), Unserved.TOO_LARGE),
        (row("a")._replace(id=None, fault=Unserved.INVALID_ID), Unserved.INVALID_ID),
    ],
)
@pytest.mark.parametrize("checks", ["module", "off"])
def test_a_row_that_cannot_be_served_is_held_like_a_bad_one(bad: Row, reason: Unserved, checks: str) -> None:
    bench = Bench(checks, "on" if checks == "module" else "off")
    bench.read(row("a"), row("b"))
    bench.read(bad, row("b", "new = 1"))
    assert bench.codes == {"a": "pass", "b": "new = 1"}
    assert bench.findings.held == {reason: 1}
    assert not bench.findings.unserved


def test_only_the_row_with_the_highest_id_of_a_name_is_judged() -> None:
    bench = Bench()
    bench.read(row("a", "good = 1", number=1))
    bench.read(row("a", "good = 1", number=1), row("a", "if", number=2))
    assert bench.codes == {"a": "good = 1"}
    assert bench.findings.held == {Unserved.CODE_INVALID: 1}
    bench.read(row("a", "good = 2", number=1), row("a", None, number=2))
    assert bench.codes == {"a": "good = 2"}


def test_only_changed_rows_are_judged_and_the_same_content_once() -> None:
    bench = Bench()
    bench.read(row("a", "x = 1"), row("b", "x = 2"))
    bench.judged.clear()
    bench.read(row("a", "x = 1"), row("b", "x = 1"), row("c", "x = 3"))
    assert bench.judged == [b"c"]
    for _ in range(2):
        bench.read(row("a", "if"), row("b", "x = 1"), row("c", "x = 3"))
    assert bench.judged == [b"c", b"a"]


def test_judging_unchanged_rows_costs_a_small_share_of_the_time_to_read_them() -> None:
    """Compares CPU times of one run. The 20,000 rows come in another order than before, and none has changed."""
    rows = [row(f"command{n}", f"x = {n}\n" * 40) for n in range(20_000)]
    gate, encoding, reviewing, kept = Gate(), [], [], []
    for seed in range(4):
        Random(seed).shuffle(rows)
        builder = SnapshotBuilder(None, gate.served)
        started = thread_time()
        builder.add(rows)
        encoded = thread_time()
        kept.append(gate.served)  # keeps the builder alive, so that the time to release it is not measured
        review = Review(gate, builder, None)
        review.find_changed()
        for name, _, _ in review.unjudged():
            review.note(name, Flaw.NONE)
        review.settle(1.0)
        encoding.append(encoded - started)
        reviewing.append(thread_time() - encoded)
    # Measured: 2 to 3 %. With one more look-up for each row it was 9 to 11 %.
    assert min(reviewing[1:]) < 0.06 * min(encoding)


def test_verdicts_are_not_shared_between_modes_and_are_bounded() -> None:
    module, function = Gate("module"), Gate("function")
    assert module.key(b"a", b"[]", b"return") != function.key(b"a", b"[]", b"return")
    assert module.key(b"a", b"[]", b"x") == module.key(b"b", b"[]", b"x")
    assert module.key(b"a", b"[1", b"]x") != module.key(b"a", b"[1]", b"x")
    small = Gate(remembered=3)
    for number in range(5):
        small.remember(bytes([number]), flaws_of(0, b"", b"", b""))
        small.known(bytes([0]))
    assert small.known(bytes([1])) is None
    assert small.known(bytes([0])) is not None


# -- a restart ---------------------------------------------------------------------------------------------------------


def restarted(bench: Bench, signer: Signer | None = None) -> Bench:
    """A new gate, for which the stored catalogue is the last good one."""
    after = Bench(signer=signer)
    after.last = bench.last
    return after


def test_a_held_command_is_held_after_a_restart() -> None:
    bench = Bench()
    bench.read(row("a", "good = 1"), row("b"))
    bench.read(row("a", "if"), row("b"))
    after = restarted(bench)
    after.now = 300.0
    (held,) = after.read(row("a", "if"), row("b", "new = 1")).held
    assert held.since == 300.0
    assert after.codes == {"a": "good = 1", "b": "new = 1"}


def test_rows_that_equal_the_stored_catalogue_are_served_first_and_judged_later() -> None:
    bench = Bench()
    bench.read(row("a"), row("b"))
    after = restarted(bench)
    after.read(row("a"), row("b", "new = 1"))
    assert after.judged == [b"b"]
    assert after.findings.unchecked == len(after.gate.pending) == 1


def test_a_row_that_vanishes_before_it_is_judged_is_no_longer_counted_as_unchecked() -> None:
    bench = Bench()
    bench.read(row("a"), row("b"), row("c"))
    after = restarted(bench)
    after.read(row("a"), row("b"), row("c"))
    assert after.gate.pending.keys() == {b"a", b"b", b"c"}
    after.read(row("b"), row("c", "new = 1"), judging=False)
    assert after.gate.pending.keys() == {b"b", b"c"}
    assert after.gate.pending[b"c"] == after.gate.served[b"c"]
    assert after.findings.unchecked == 2


def test_a_bad_stored_version_is_not_used_as_the_last_good_version() -> None:
    """A release that had no gate may have stored a bad version."""
    old = Bench("off", "off")
    old.read(row("a", "if"), row("b", "else"), row("c"))
    after = restarted(old)
    change = after.read(row("a", "while"), row("b", "else"), row("c"))
    assert change.left_out == (("a", Unserved.CODE_INVALID),)
    digest = after.gate.pending[b"b"]
    assert after.gate.note_pending(b"b", digest, flaws_of(after.gate.checks, b"b", b"[]", b"else"))
    assert after.read(row("a", "while"), row("b", "else"), row("c")).left_out == (("b", Unserved.CODE_INVALID),)
    assert after.codes.keys() == {"c"}


def test_a_held_command_is_signed_with_the_present_key() -> None:
    bench = Bench(signer=Signer("yesterday"))
    bench.read(row("a", "good = 1"))
    bench.signer = SIGNER
    bench.read(row("a", "if"))
    assert bench.last is not None
    held = bench.last.get("a")
    assert held is not None
    assert SIGNER.unpack(held.code) == b"good = 1"
    again = Bench(signer=SIGNER)
    again.read(row("a", "good = 1"))
    assert again.last is not None
    assert again.last.answer(b"a") == bench.last.answer(b"a")


# -- rows that were not judged -----------------------------------------------------------------------------------------


def test_rows_are_served_unchecked_and_judged_later_if_no_checker_runs() -> None:
    bench = Bench()
    bench.read(row("a"), row("b"))
    bench.read(row("a", "if"), row("b", "new = 1"), judging=False)
    assert bench.findings.unchecked == 2
    assert bench.gate.pending.keys() == {b"a", b"b"}
    digest = bench.gate.pending[b"b"]
    assert not bench.gate.note_pending(b"b", digest, flaws_of(bench.gate.checks, b"b", b"[]", b"new = 1"))
    assert bench.gate.pending.keys() == {b"a"}
    assert not bench.gate.note_pending(b"a", b"another version", flaws_of(bench.gate.checks, b"a", b"[]", b"if"))
    assert bench.gate.note_pending(b"a", bench.gate.pending[b"a"], flaws_of(bench.gate.checks, b"a", b"[]", b"if"))
    bench.read(row("a", "if"), row("b", "new = 1"))
    assert bench.codes == {"b": "new = 1"}


def test_an_unjudged_version_that_replaces_a_bad_row_must_still_be_judged() -> None:
    """A version that is served in place of a row without code may be bad itself, so it is not yet a good version."""
    bench = Bench()
    bench.read(row("a", "if"), row("b"), judging=False)
    bench.read(row("a", None), row("b"), judging=False)
    assert bench.last is not None
    served = bench.last.get("a")
    assert served is not None
    assert served.code == b"if", "no checker could judge it"
    assert bench.gate.held[b"a"].reason is Unserved.NULL_CODE
    assert bench.gate.pending.keys() == {b"a", b"b"}
    assert bench.findings.unchecked == 2
    bench.read(row("a", None), row("b"))
    assert bench.codes == {"b": "pass"}, "once judged, it does not count as a good version"
    assert not bench.gate.held


def test_a_version_that_was_judged_good_is_held_without_being_judged_again() -> None:
    bench = Bench()
    bench.read(row("a"), row("b"), judging=False)
    bench.read(row("a"), row("b"))
    for name, digest in tuple(bench.gate.pending.items()):
        bench.gate.note_pending(name, digest, Flaw.NONE)
    bench.read(row("a", None), row("b"), judging=False)
    assert bench.codes == {"a": "pass", "b": "pass"}
    assert not bench.gate.pending


def test_an_interface_that_only_python_can_read_is_suspect_as_long_as_it_is_served() -> None:
    bench = Bench()
    for other in ("x = 1", "x = 2"):
        bench.read(row("a", interface="[NaN]"), row("b", other))
        assert bench.findings.suspect == {Suspect.INTERFACE_NOT_JSON_ARRAY: 1}
    bench.read(row("a"), row("b"))
    assert not bench.findings.suspect


# -- another version of Python -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("good", "bad", "tolerated"), [(94, 6, True), (114, 6, False), (0, 5, False), (0, 6, True)])
def test_much_code_that_is_refused_at_a_first_start_is_served_as_suspect(good: int, bad: int, tolerated: bool) -> None:
    bench = Bench()
    rows = [row(f"g{n}") for n in range(good)] + [row(f"b{n}", f"if {n}") for n in range(bad)]
    change = bench.read(*rows)
    assert bench.last is not None
    assert bench.last.count == good + bad * tolerated
    assert change.tolerated == bad * tolerated
    assert bench.findings.suspect.get(Suspect.CODE_INVALID_HERE, 0) == bad * tolerated
    assert bench.read(*rows).tolerated == 0


def test_after_the_first_start_much_refused_code_is_held() -> None:
    bench = Bench()
    bench.read(*(row(f"c{n}") for n in range(20)))
    bench.read(*(row(f"c{n}", "if") for n in range(20)))
    assert bench.findings.held == {Unserved.CODE_INVALID: 20}
    assert set(bench.codes.values()) == {"pass"}


def test_a_restart_does_not_serve_new_rows_that_were_left_out_before_it() -> None:
    """Otherwise ten bad rows in the table would stop every strict client at the next deployment."""
    rows = [row(f"g{n}") for n in range(100)]
    bad = [row(f"b{n}", f"if {n}") for n in range(10)]
    bench = Bench()
    bench.read(*rows)
    assert len(bench.read(*rows, *bad).left_out) == 10
    after = restarted(bench)
    assert after.read(*rows, *bad).tolerated == 0
    assert len(after.codes) == 100
    after.read(*rows, *bad, row("new"))
    assert len(after.codes) == 101


def test_much_code_that_a_stored_catalogue_serves_is_still_served_after_a_restart() -> None:
    rows = [*(row(f"g{n}") for n in range(90)), *(row(f"b{n}", f"if {n}") for n in range(10))]
    bench = Bench()
    bench.read(*rows)
    after = restarted(bench)
    after.read(*rows)
    assert len(after.gate.pending) == 100
    for name, digest in list(after.gate.pending.items()):
        code = b"if" if name.startswith(b"b") else b"pass"
        after.gate.note_pending(name, digest, flaws_of(after.gate.checks, name, b"[]", code))
    assert after.read(*rows).tolerated == 10
    assert after.last is not None
    assert after.last.count == 100


def test_refused_code_that_replaces_tolerated_code_is_tolerated() -> None:
    bench = Bench()
    bench.read(*(row(f"c{n}", "if") for n in range(10)))
    bench.read(row("c0", "while"), row("c1"), *(row(f"c{n}", "if") for n in range(2, 10)))
    assert bench.last is not None
    assert bench.last.count == 10
    found = bench.last.get("c0")
    assert found is not None
    assert found.code == b"while"
    assert bench.gate.held == {}
    bench.read(row("c0"), row("c1", "if"), *(row(f"c{n}", "if") for n in range(2, 10)))
    assert bench.gate.held.keys() == {b"c1"}


# -- any table ---------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "año", "d\0"])
CODES = st.sampled_from(["pass", "x = 1", "if", "return", "\0", "# coding: x\n", "\ufeffx = 1", "(" * 300]) | st.text(
    max_size=8
)
INTERFACES = st.sampled_from(["[]", "", "{}", "[NaN]", "[1,]", "[" * 2000, "null"]) | st.text(max_size=4)
ROWS = st.builds(
    lambda number, name, code, interface: row(name, code, interface, number),
    st.integers(1, 9),
    NAMES,
    st.none() | CODES,
    INTERFACES,
)


@given(st.lists(st.lists(ROWS, max_size=8), min_size=1, max_size=5), st.sampled_from([None, SIGNER]))
def test_a_strict_client_can_refresh_from_any_table(tables: list[list[Row]], signer: Signer | None) -> None:
    bench = Bench(signer=signer)
    bench.read(row("z"))  # the first start is over
    before: dict[str, str] = {}
    for table in tables:
        bench.read(*table)
        codes = bench.codes
        present = {(each.name or b"").decode() for each in table}
        assert codes.keys() <= present
        # A command that was served and is still in the table remains served, in its present version or an earlier one.
        assert before.keys() & present <= codes.keys()
        before = codes


@given(st.lists(ROWS, max_size=8))
def test_a_held_command_has_a_reason_and_the_hash_that_is_served(table: list[Row]) -> None:
    bench = Bench()
    bench.read(*(row(name) for name in ("a", "b", "c", "año")))
    bench.read(*table)
    assert bench.last is not None
    for name, held in bench.gate.held.items():
        assert isinstance(held, Held)
        served = bench.last.get(name.decode())
        assert served is not None
        assert served.hash == held.hash_served != held.hash_refused
    assert sum(bench.findings.held.values()) == len(bench.gate.held)
