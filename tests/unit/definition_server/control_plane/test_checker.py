"""The checker: a hostile source can at most end the checker process. The answers of this process are not trusted, and
it runs only when it is needed."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.leftovers import nothing_left
from tests.support.loop import eventually

from definition_server.catalog.content_check import FUNCTION, INTERFACE, MODULE, READY, Flaw
from definition_server.control_plane import checker as module
from definition_server.control_plane.checker import CannotCheck, Checker, Content, Judgement
from definition_server.control_plane.checker_process import HEADER, command

EVERYTHING = MODULE | INTERFACE
GOOD = Content(EVERYTHING, b"good", b"[]", b"x = 1")
BAD = Judgement(Flaw.CODE)
FINE = Judgement(Flaw.NONE)


def content(code: bytes, interface: bytes = b"[]", checks: int = EVERYTHING) -> Content:
    return Content(checks, b"name", interface, code)


@pytest.fixture
async def checker() -> AsyncIterator[Checker]:
    with nothing_left():
        checker = Checker()
        yield checker
        await checker.close()


async def test_rows_are_judged_in_order(checker: Checker) -> None:
    rows = [GOOD, content(b"if"), content(b"", b"{}"), content(b"if", b"["), content(b"", b"[NaN]"), GOOD]
    judged = [each.flaws for each in await checker.check(rows)]
    assert judged == [
        Flaw.NONE, Flaw.CODE, Flaw.INTERFACE, Flaw.CODE | Flaw.INTERFACE, Flaw.NOT_STRICT_JSON, Flaw.NONE,
    ]  # fmt: skip
    assert await checker.check([]) == []
    assert checker.started == 1


async def test_thousands_of_rows_and_large_ones_are_judged(checker: Checker) -> None:
    rows = [content(b"x = %d" % number if number % 7 else b"if") for number in range(2000)]
    rows[100:100] = [content(b"# " + b"x" * 3_000_000 + b"\nif"), content(b"# " + b"x" * 3_000_000)]
    assert [each.flaws for each in await checker.check(rows)] == [
        Flaw.CODE if row.code.endswith(b"if") else Flaw.NONE for row in rows
    ]


HOSTILE = {
    "10,000 brackets": b"[" * 10_000 + b"]" * 10_000,
    "100,000 signs": b"-" * 100_000 + b"1",
    "100,000 lambdas": b"lambda:" * 100_000 + b"1",
    "20,000 branches": b"if a:\n pass\n" + b"elif a:\n pass\n" * 20_000,
    "10,000,000 digits": b"x = " + b"1" * 10**7,
    "a null byte": b"x = 1\0",
    "an unknown coding": b"# -*- coding: nosuch -*-\nx = 1",
    "a long sum": b"1+" * 200_000 + b"1",
    "a codec that is no coding": b"# coding: hex\nx = 1",
    "a sound coding of unsound code": b"# coding: cp1250\nif",
    "a coding of another system": b"# coding: mbcs\nx = 1",
    "octets that are not valid in the coding": b"# coding: iso2022_jp\nx = '\xc3\xb1'",
    "a coding by a path": b"# coding: ../../../etc/passwd\nx = 1",
    "a form feed before the coding": b"\x0c# coding: nosuch\nx = 1",
    "a mark and another coding": b"\xef\xbb\xbf# coding: latin-1\nx = 1",
    "deep attributes": b"x = a" + b".b" * 100_000,
    "deep calls": b"x = a" + b"()" * 50_000,
    "nested replacement fields": b"x = f'{1:" + b"{1:" * 50 + b"}" * 50 + b"}'",
    "4,301 digits": b"x = " + b"9" * 4301,
    "an unknown character name": b"x = '\\N{" + b"A" * 100_000 + b"}'",
    "a control character": b"x = 1\x1a",
    "a mark of direction in a name": "x\u202ey = 1".encode(),
}


@pytest.mark.parametrize("code", HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_source_is_refused_and_the_other_rows_are_judged(checker: Checker, code: bytes) -> None:
    assert await checker.check([GOOD, content(code), content(b"if"), GOOD]) == [FINE, BAD, BAD, FINE]


@pytest.mark.thorough
async def test_a_list_that_would_take_gigabytes_is_refused(checker: Checker) -> None:
    assert await checker.check([content(b"x = [" + b"1," * 2_000_000 + b"]"), GOOD]) == [BAD, FINE]


@pytest.mark.parametrize("code", [
        b"x = 1 << 10**9", b"x = 'a' * 10**9", b"x = '\\d'", b"1 is 1", b"@a\ndef f(): pass", b"x = 9**9**9",
        b"x = (2**127)**10**8", b"x = ((1,) * 1000,) * 10**5", b"x = b'a' * 10**8", b"x = " + b"9" * 4300,
        b"x = 0x" + b"f" * 10**6, b"x = a" + b".b" * 900, b"x = " + b"'a' " * 10**5,
        b"\x0cx = 1\n\x0c\nif x:\n\x0c  y = 1",
        b"x = 1\ry = 2", b"\n\n# coding: nosuch\nx = 1", b"x = 1 # coding: nosuch", b"f(" + b"a," * 10**5 + b")",
        "x = '\u202e'".encode(), b"x = 1e99999", b"from __future__ import annotations",
    ],
)  # fmt: skip
async def test_a_source_that_is_unusual_but_valid_passes(
    checker: Checker, code: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    assert await checker.check([content(code)]) == [FINE]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "code",
    ["a\xf1o = 1", "\U0001d431 = 1", 'x = "\\N{BULLET}"', "def \u6f22(): pass"]
    + [
        f"# -*- coding: {name} -*-\nx = 1"
        for name in ("cp1250", "ISO-8859-2", "gbk", "koi8-r", "idna", "palmos", "raw_unicode_escape")
    ],
    ids=ascii,
)
async def test_code_for_which_python_must_load_a_module_passes_in_the_jail(checker: Checker, code: str) -> None:
    compile(code, "command", "exec")
    assert await checker.check([content(code.encode())]) == [FINE]


async def test_a_row_is_judged_again_if_earlier_rows_may_have_filled_the_memory(checker: Checker) -> None:
    await checker.check([GOOD])
    assert await checker.check([content(b"-" * 100_000 + b"1")]) == [BAD]
    assert checker.started == 2


# -- the process -------------------------------------------------------------------------------------------------------


async def test_a_checker_has_no_environment_no_descriptors_and_a_low_priority(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://secret")
    await checker.check([GOOD])
    checker.lower_priority()
    process = Path(f"/proc/{checker.pid}")
    assert os.getpriority(os.PRIO_PROCESS, checker.pid or 0) > os.getpriority(os.PRIO_PROCESS, 0)
    status = (process / "status").read_text()
    assert "NoNewPrivs:\t1" in status
    limits = (process / "limits").read_text()
    assert "Max address space         536870912" in limits
    assert "Max processes             0 " in limits
    if os.geteuid() == 0:
        assert b"secret" not in (process / "environ").read_bytes()
        targets = {str(each.readlink()) for each in (process / "fd").iterdir()}
        assert len([each for each in targets if each.startswith("socket:")]) == 1
        # A newer libffi, such as that of Debian sid, keeps the file of its own library open.
        others = {each for each in targets if not each.startswith("socket:") and "/libffi.so." not in each}
        assert others == {"/dev/null"}


async def test_a_checker_starts_when_it_is_needed_and_stops_when_it_is_idle() -> None:
    with nothing_left():
        checker = Checker(idle_seconds=0.05)
        assert checker.pid is None
        assert await checker.check([GOOD]) == [FINE]
        pid = checker.pid
        assert pid is not None
        await eventually(lambda: not Path(f"/proc/{pid}").exists(), "the process has ended")
        assert checker.pid is None
        assert await checker.check([GOOD]) == [FINE]
        await checker.close()


async def test_a_prepared_checker_that_is_not_used_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()

    class Process:
        async def end(self) -> None:
            ended.set()

    async def start(self: Any) -> None:
        self._process = Process()

    monkeypatch.setattr(Checker, "_running", start)
    checker = Checker(idle_seconds=0.001)
    await checker.prepare()
    async with asyncio.timeout(10):
        await ended.wait()
    assert checker.pid is None
    await checker.close()


async def test_a_killed_checker_is_replaced(checker: Checker) -> None:
    await checker.prepare()
    os.kill(checker.pid or 0, 9)
    assert await checker.check([GOOD, content(b"if")]) == [FINE, BAD]


# -- a checker that cannot be trusted ----------------------------------------------------------------------------------


def program(body: str) -> Callable[[int, str], list[str]]:
    """A checker process that runs ``body`` after its start. In ``body``, ``rows()`` yields the code of each row, and
    ``end`` is the socket of the process."""
    text = f"""
import os, signal, socket, struct, sys, time
end = socket.socket(fileno=int(sys.argv[1]))
stream = end.makefile("rb")
def rows():
    while header := stream.read({HEADER.size}):
        yield [stream.read(length) for length in struct.unpack({HEADER.format!r}, header)[1:]][2]
def good(): end.sendall(b"@")
end.sendall({READY!r})
{body}
"""
    return lambda descriptor, _: [sys.executable, "-I", "-S", "-c", text, str(descriptor)]


BROKEN = {
    "it ends": "for code in rows():\n  if code == b'bad': sys.exit()\n  good()",
    "it crashes": "for code in rows():\n  if code == b'bad': os.kill(os.getpid(), signal.SIGSEGV)\n  good()",
    "it is killed": "for code in rows():\n  if code == b'bad': os.kill(os.getpid(), signal.SIGKILL)\n  good()",
    "it answers something invalid": "for code in rows():\n  end.sendall(b'\\xff') if code == b'bad' else good()",
    "it hangs": "for code in rows():\n  if code == b'bad': time.sleep(60)\n  good()",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
async def test_only_the_row_that_ends_the_checker_is_refused(body: str) -> None:
    with nothing_left():
        checker = Checker(program=program(body), wall_per_cpu_second=0.5)
        judged = await checker.check([GOOD, content(b"bad"), GOOD, content(b"bad")])
        assert [each.flaws for each in judged] == [Flaw.NONE, Flaw.CODE, Flaw.NONE, Flaw.CODE]
        assert checker.started > 1
        await checker.close()


async def test_no_verdict_is_remembered_if_the_row_may_not_have_ended_the_process() -> None:
    with nothing_left():
        checker = Checker(program=program(BROKEN["it is killed"]))
        assert await checker.check([content(b"bad")]) == [Judgement(Flaw.CODE, lasting=False)]
        await checker.close()
        checker = Checker(program=program(BROKEN["it crashes"]))
        assert await checker.check([content(b"bad")]) == [Judgement(Flaw.CODE, lasting=True)]
        await checker.close()


async def test_an_answer_that_comes_after_its_check_was_cancelled_is_not_that_of_another_row() -> None:
    slow = "for code in rows():\n  time.sleep(0.2)\n  end.sendall(b'A') if code == b'bad' else good()"
    with nothing_left():
        checker = Checker(program=program(slow))
        task = asyncio.create_task(checker.check([content(b"bad")] * 3))
        await eventually(lambda: checker._process is not None and checker._process.octets > 0, "the rows are sent")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert await checker.check([GOOD, content(b"bad")]) == [FINE, BAD]
        await checker.close()


@pytest.mark.parametrize("codings", [True, False])
async def test_a_process_loads_all_codings_only_if_a_row_needs_them(codings: bool) -> None:
    told = program("for code in rows():\n  end.sendall(b'A' if 'codings' in sys.argv else b'@')")
    with nothing_left():
        process = await module._CheckerProcess.start(told, "off", 10.0, patient=False, codings=codings)
        judged: list[Judgement] = []
        await process.ask([GOOD], judged)
        await process.end()
        assert (judged == [FINE]) is not codings


async def test_surplus_answers_are_not_used_for_later_rows() -> None:
    with nothing_left():
        checker = Checker(program=program("for code in rows():\n  end.sendall(b'@' * 9)"))
        judged = await checker.check([GOOD])
        assert len(judged) == 1
        await checker.check([GOOD, GOOD])
        assert checker.started > 1
        await checker.close()


@pytest.mark.parametrize(
    "start",
    [
        lambda *_: ["/does/not/exist"],
        lambda *_: [sys.executable, "-c", "raise SystemExit(1)"],
        lambda descriptor, _: [sys.executable, "-I", "-c", f"import os; os.write({descriptor}, b'hello')"],
    ],
    ids=["no program", "it ends at once", "it answers something else"],
)
async def test_a_check_raises_the_reason_if_no_checker_can_be_started(
    start: Callable[[int, str], list[str]],
) -> None:
    with nothing_left():
        checker = Checker(program=start)
        await checker.prepare()
        with pytest.raises(CannotCheck, match="checker process"):
            await checker.check([GOOD])
        await checker.close()


async def test_a_start_that_hangs_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.START_SECONDS == 15.0, "the longest time that a first cycle waits"
    monkeypatch.setattr(module, "START_SECONDS", 0.1)
    with nothing_left():
        checker = Checker(program=lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
        started = time.monotonic()
        with pytest.raises(CannotCheck):
            await checker.check([GOOD])
        await checker.close()
        assert time.monotonic() - started < 20


async def test_a_top_level_return_is_judged_as_the_setting_says(checker: Checker) -> None:
    rows = [content(b"return 1", checks=FUNCTION), content(b"return 1"), content(b"if", checks=0)]
    assert [each.flaws for each in await checker.check(rows)] == [Flaw.NONE, Flaw.CODE, Flaw.NONE]


@pytest.mark.parametrize(("prefix", "option"), [("/opt/bytecode", ["pycache_prefix=/opt/bytecode"]), (None, [])])
def test_the_checker_uses_the_bytecode_cache_of_the_master(
    monkeypatch: pytest.MonkeyPatch, prefix: str | None, option: list[str]
) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", prefix)
    arguments = command(3, "auto")
    assert [each for each in arguments if each.startswith("pycache_prefix")] == option


# -- a patient checker -------------------------------------------------------------------------------------------------


async def test_a_patient_checker_runs_only_on_idle_cpus_and_gives_the_same_verdicts() -> None:
    with nothing_left():
        checker = Checker(patient=True)
        rows = [GOOD, content(b"if"), content(b"-" * 100_000 + b"1"), content(b"", b"[NaN]"), GOOD]
        judged = [each.flaws for each in await checker.check(rows)]
        assert judged == [Flaw.NONE, Flaw.CODE, Flaw.CODE, Flaw.NOT_STRICT_JSON, Flaw.NONE]
        assert checker.pid is not None
        assert os.sched_getscheduler(checker.pid) == os.SCHED_IDLE
        await checker.close()


async def test_a_patient_checker_has_the_lowest_priority_if_the_idle_policy_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with nothing_left():
        checker = Checker(patient=True)
        assert await checker.check([GOOD, content(b"if")]) == [FINE, BAD]
        assert os.getpriority(os.PRIO_PROCESS, checker.pid or 0) == 19
        await checker.close()


async def test_answers_of_a_patient_checker_wake_the_event_loop_less_than_once_per_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, readers = asyncio.get_running_loop(), []
    add_reader = loop.add_reader
    monkeypatch.setattr(loop, "add_reader", lambda file, *rest: (readers.append(file), add_reader(file, *rest)))
    with nothing_left():
        checker = Checker(patient=True)
        await checker.check([GOOD])
        assert checker._process is not None
        assert checker._process._end not in readers
        await checker.close()


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
async def test_a_patient_checker_that_ends_or_hangs_is_noticed(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The limit of this test is so short that, on busy CPUs, even the valid row would be late.
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: None)
    with nothing_left():
        checker = Checker(patient=True, program=program(body), wall_per_cpu_second=0.5)
        judged = await checker.check([GOOD, content(b"bad"), GOOD])
        assert [each.flaws for each in judged] == [Flaw.NONE, Flaw.CODE, Flaw.NONE]
        await checker.close()


def test_the_size_of_a_content_is_the_sum_of_its_parts() -> None:
    assert Content(0, b"name", b"interface", b"cd").size == 15
