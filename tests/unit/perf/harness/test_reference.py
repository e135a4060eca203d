"""The reference work: its opcodes, and its measurement during a run."""

from __future__ import annotations

import dis
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from perf.harness import reference, reference_work
from perf.targets.processes import is_alive, precise_cpu_seconds
from tests.support.polling import until


def test_the_work_checks_its_own_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_work, "_ROUNDS", 1)
    assert reference_work.python_work()() == 64
    monkeypatch.setattr(reference_work, "_LENGTHS", {})
    with pytest.raises(AssertionError, match="gives a wrong answer"):
        reference_work.python_work()()


def test_the_cost_of_an_item_is_in_microseconds() -> None:
    times = iter([1_000, 7_000])
    assert reference_work.each_us(lambda: 2, lambda: next(times)) == 3.0


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the docstring's table lists the opcodes of CPython 3.11")
def test_the_docstring_states_the_work_s_shares_of_opcodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_work, "_ROUNDS", 2)
    executed: Counter[str] = Counter()
    work = reference_work.python_work()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            executed[dis.opname[frame.f_code.co_code[frame.f_lasti]]] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        calls = work()
    finally:
        sys.settrace(before)
    told = {
        "LOAD_FAST, STORE_FAST": ("LOAD_FAST", "STORE_FAST"),
        "LOAD_ATTR, LOAD_METHOD, STORE_ATTR": ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR"),
        "PRECALL, CALL": ("PRECALL", "CALL"),
        "comparisons and jumps": ("COMPARE_OP", "CONTAINS_OP", *(name for name in executed if "JUMP" in name)),
        "BINARY_OP (int arithmetic)": ("BINARY_OP",),
        "BUILD_SLICE, BINARY_SUBSCR": ("BUILD_SLICE", "BINARY_SUBSCR"),
    }
    lines = (reference_work.__doc__ or "").splitlines()
    for start, names in told.items():
        (line,) = [each for each in lines if each.startswith(start)]
        share = 100 * sum(executed[name] for name in names) / executed.total()
        assert abs(share - float(line.split()[-1].rstrip("%"))) <= 1, start
    (line,) = [each for each in lines if each.startswith("all together")]
    assert executed.total() / calls == pytest.approx(float(line.split()[-1]), rel=0.02)


def test_the_work_runs_in_bursts_until_it_is_stopped_and_leaves_no_process() -> None:
    began = time.monotonic()
    with reference.Meter() as meter:
        pid = meter._process.pid
        until(lambda: precise_cpu_seconds([pid]) >= 0.1, "the work runs")
        bursts = meter.stop()
    assert bursts
    assert all(began <= when < time.monotonic() and 0 < python < 1000 and 0 < kernel < 1000
               for when, python, kernel in bursts)  # fmt: skip
    assert not is_alive(pid)


def test_work_that_fails_is_an_invalid_run_with_its_error_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "work.py"
    program.write_text("raise SystemExit('no loopback')")
    monkeypatch.setattr(reference, "_PROGRAM", program)
    run = reference.beside(lambda measuring: {"valid": True, "seconds": 1.0})
    assert (run["valid"], run["fault"]) == (False, "harness")
    assert "no loopback" in run["reason"]


def test_an_error_in_the_run_ends_the_work() -> None:
    meters: list[reference.Meter] = []

    def meter() -> reference.Meter:
        meters.append(reference.Meter())
        return meters[0]

    def run(measuring: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference.beside(run, meter)
    assert not is_alive(meters[0]._process.pid)


def test_the_speed_is_the_mean_of_the_bursts_during_the_run() -> None:
    bursts = [(0.9, 9.0, 90.0), (1.0, 1.0, 10.0), (1.5, 2.0, 30.0), (2.1, 9.0, 90.0)]
    assert reference.during(bursts, 1.0, 2.0) == {"python_us": 1.5, "kernel_us": 20.0, "bursts": 2}
    assert reference.during(bursts, 3.0, 4.0) == {"python_us": 0.0, "kernel_us": 0.0, "bursts": 0}


@pytest.mark.parametrize(("calls", "counted"), [(True, [10.0, 11.0]), (False, [12.0, 13.0])])
def test_a_run_that_does_not_report_the_beginning_of_its_measurement_is_measured_at_its_end(
    calls: bool, counted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10.0]
    monkeypatch.setattr(reference, "monotonic", lambda: now[0])

    class Fake(reference.Meter):
        def __enter__(self) -> Fake:
            return self

        def stop(self) -> list[reference.Burst]:
            return [(when, when, 0.0) for when in (9.0, 10.0, 11.0, 12.0, 13.0)]

        def __exit__(self, *_: object) -> None:
            """No process was started."""

    def run(measuring: Callable[[], None]) -> dict[str, Any]:
        if calls:
            measuring()
        now[0] = 13.0
        return {"seconds": 1.0}

    made = reference.beside(run, Fake)
    assert made["reference"] == {"python_us": sum(counted) / 2, "kernel_us": 0.0, "bursts": 2}
