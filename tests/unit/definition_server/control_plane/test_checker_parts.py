"""The checker's decisions about its process. The test plays the process, so none is started."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from definition_server.catalog.content_check import ANSWER, MODULE, Flaw
from definition_server.control_plane import checker as module
from definition_server.control_plane.checker import Checker, Content, Judgement
from definition_server.control_plane.checker_process import HEADER

pytestmark = pytest.mark.usefixtures("nothing_is_left")

BAD, FINE = Judgement(Flaw.CODE), Judgement(Flaw.NONE)


def content(octets: int) -> Content:
    return Content(MODULE, b"n", b"", b"c" * (octets - 1))


# -- rows that are sent at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "windows"),
    [
        ([], []),
        ([1], [1]),
        ([1] * 64, [64]),
        ([1] * 65, [64, 1]),
        ([1] * 129, [64, 64, 1]),
        ([524_288] * 2, [2]),
        ([524_288, 524_289], [1, 1]),
        ([524_288] * 5, [2, 2, 1]),
        ([5_000_000, 1, 5_000_000], [1, 1, 1]),
    ],
    ids=["none", "one", "64", "65", "129", "a mebibyte", "an octet more", "five halves", "large ones"],
)
def test_64_rows_or_a_mebibyte_are_sent_at_once(sizes: list[int], windows: list[int]) -> None:
    contents = [content(size) for size in sizes]
    found = list(module._windows(contents))
    assert [len(window) for window in found] == windows
    assert [each for window in found for each in window] == contents


# -- rows whose process ends -------------------------------------------------------------------------------------------


class Process:
    """A process that returns the answers that the test has set for each question, and then raises the exception if one
    is set."""

    ended = False

    def __init__(self, *answers: Any, octets: int = 0) -> None:
        self.answers = list(answers)
        self.octets = octets
        self.asked: list[int] = []
        self.stopped = self.lowered = 0

    async def ask(self, contents: Sequence[Content], judged: list[Judgement]) -> None:
        self.asked.append(len(contents))
        self.octets += sum(each.size for each in contents)
        while self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            judged.append(answer)

    async def end(self) -> None:
        self.stopped += 1

    def lower_priority(self) -> None:
        self.lowered += 1


class Bench:
    """A checker with these processes, which it uses in this order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *processes: Process) -> None:
        self.processes = list(processes)
        self.left = list(processes)
        self.codings: list[bool] = []
        self.checker = Checker()

        async def start(*_: Any, patient: bool, codings: bool) -> Process:
            self.codings.append(codings)
            return self.left.pop(0)

        monkeypatch.setattr(module._CheckerProcess, "start", start)

    async def check(self, rows: int) -> list[Judgement]:
        judged = await self.checker.check([content(10)] * rows)
        await asyncio.sleep(0)  # processes that the checker has stopped have ended
        return judged


async def close(bench: Bench) -> None:
    await bench.checker.close()
    assert [process.stopped for process in bench.processes] == [1] * len(bench.processes)
    assert not bench.left


OWN = {"own_fault": True, "lasting": True}
LATE = {"own_fault": True, "lasting": False}
ENDED = {"own_fault": False, "lasting": True}
KILLED = {"own_fault": False, "lasting": False}


@pytest.mark.parametrize("how", [OWN, LATE], ids=["CPU time", "late"])
async def test_a_row_that_ends_a_process_by_its_own_fault_is_refused_and_not_judged_again(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, bool]
) -> None:
    bench = Bench(monkeypatch, Process(FINE, module._Ended(**how), octets=5), Process(FINE))
    assert await bench.check(3) == [FINE, Judgement(Flaw.CODE, how["lasting"]), FINE]
    assert [process.asked for process in bench.processes] == [[3], [1]]
    await close(bench)


async def test_a_row_that_ends_a_process_after_other_rows_is_judged_again_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, Process(FINE, module._Ended(**ENDED)), Process(FINE, FINE))
    assert await bench.check(3) == [FINE, FINE, FINE]
    assert [process.asked for process in bench.processes] == [[3], [1]]
    await close(bench)


@pytest.mark.parametrize(
    ("octets", "how", "again"),
    [(0, ENDED, False), (0, KILLED, True), (5, ENDED, True), (5, KILLED, True)],
    ids=["ended at the first row", "killed at the first row", "ended later", "killed later"],
)
async def test_the_first_row_of_a_new_process_is_judged_alone_unless_the_process_was_killed(
    monkeypatch: pytest.MonkeyPatch, octets: int, how: dict[str, bool], again: bool
) -> None:
    processes = [Process(module._Ended(**how), octets=octets)]
    if again:
        processes.append(Process(module._Ended(**KILLED)))
    bench = Bench(monkeypatch, *processes)
    assert await bench.check(1) == [Judgement(Flaw.CODE, not again)]
    assert bench.checker.started == len(processes)
    await close(bench)


async def test_a_row_that_needs_other_codings_is_judged_by_a_process_with_all_codings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, Process(FINE, module._LacksCoding()), Process(BAD))
    assert await bench.check(2) == [FINE, BAD]
    assert bench.codings == [False, True]
    await close(bench)


async def test_codings_that_a_row_judged_alone_needs_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, Process(FINE, module._Ended(**ENDED)), Process(module._LacksCoding()), Process(FINE))
    assert await bench.check(2) == [FINE, FINE]
    assert bench.codings == [False, False, True]
    await close(bench)


@pytest.mark.parametrize(("most", "started"), [(20, 1), (19, 2)])
async def test_a_process_that_was_sent_much_source_is_replaced(
    monkeypatch: pytest.MonkeyPatch, most: int, started: int
) -> None:
    monkeypatch.setattr(module, "_MOST_OCTETS", most)
    bench = Bench(monkeypatch, *(Process(FINE, FINE) for _ in range(started)))
    assert await bench.check(2) == [FINE, FINE]
    if started == 1:
        bench.processes[0].answers = [FINE]
    else:
        bench.processes[1].answers = [FINE]
    assert await bench.check(1) == [FINE]
    assert bench.checker.started == started
    await close(bench)


async def test_a_lower_priority_is_given_to_the_running_process_and_to_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, Process(FINE), Process(FINE))
    await bench.check(1)
    assert bench.processes[0].lowered == 0
    bench.checker.lower_priority()
    assert bench.processes[0].lowered == 1
    bench.processes[0].ended = True
    await bench.check(1)
    assert bench.processes[1].lowered == 1
    await close(bench)


async def test_each_use_postpones_the_end_of_an_idle_process(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, Process(FINE))
    await bench.check(1)
    first = bench.checker._idle
    assert first is not None
    assert 299 < first.when() - asyncio.get_running_loop().time() <= 300
    bench.processes[0].answers = [FINE]
    await bench.check(1)
    second = bench.checker._idle
    assert first.cancelled()
    assert second is not None
    await close(bench)
    assert second.cancelled()


# -- answers of a process ----------------------------------------------------------------------------------------------


class Peer:
    """A process whose end of the socket belongs to the test."""

    def __init__(self, code: int = 0, *, codings: bool = False, hangs: bool = False) -> None:
        self.end, ours = socket.socketpair()
        ours.setblocking(False)
        self.code, self.hangs = code, hangs
        process = SimpleNamespace(pid=4711, returncode=code, wait=self._wait, kill=lambda: None)
        self.process = module._CheckerProcess(cast(Any, process), ours, 10.0, patient=False, codings=codings)

    async def _wait(self) -> int:
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        return self.code

    async def ask(self, answers: bytes, rows: int = 1) -> tuple[list[Judgement], Exception | None]:
        """The result for ``rows`` if the process sends these answers."""
        judged: list[Judgement] = []
        self.end.sendall(answers)
        try:
            await self.process.ask([content(10)] * rows, judged)
        except (module._Ended, module._LacksCoding) as error:
            return judged, error.with_traceback(None)
        return judged, None

    async def close(self) -> None:
        self.hangs = False
        await self.process.end()
        self.end.close()


def octets(*flaws: Flaw) -> bytes:
    return bytes(ANSWER + flaw for flaw in flaws)


async def outcome(answers: bytes, rows: int = 1, **given: Any) -> tuple[list[Judgement], Any]:
    peer = Peer(**given)
    found = await peer.ask(answers, rows)
    await peer.close()
    return found


async def test_each_answer_is_the_judgement_of_a_row() -> None:
    judged, error = await outcome(octets(Flaw.NONE, Flaw.CODE | Flaw.INTERFACE, Flaw.NOT_STRICT_JSON), 3)
    assert judged == [FINE, Judgement(Flaw.CODE | Flaw.INTERFACE), Judgement(Flaw.NOT_STRICT_JSON)]
    assert error is None


@pytest.mark.parametrize("octet", [0, ANSWER - 1, ANSWER + 32, 255])
async def test_an_invalid_answer_ends_the_process_and_leaves_the_row_unjudged(octet: int) -> None:
    judged, error = await outcome(bytes([ANSWER, octet]), 2)
    assert judged == [FINE]
    assert (error.own_fault, error.lasting) == (False, True)


async def test_an_answer_may_hold_all_flaws() -> None:
    judged, error = await outcome(bytes([ANSWER + 31]), codings=True)
    assert judged == [Judgement(Flaw.CODE | Flaw.INTERFACE | Flaw.NOT_STRICT_JSON)]
    assert error is None


async def test_a_row_that_ran_out_of_memory_is_judged_again_unless_it_was_the_first() -> None:
    exhausted = Flaw.CODE | Flaw.EXHAUSTED
    assert await outcome(octets(exhausted)) == ([BAD], None)
    judged, error = await outcome(octets(Flaw.NONE, exhausted), 2)
    assert judged == [FINE]
    assert (error.own_fault, error.lasting) == (False, True)


async def test_an_unknown_coding_is_a_flaw_only_if_all_codings_are_loaded() -> None:
    unknown = octets(Flaw.CODE | Flaw.UNKNOWN_CODING)
    judged, error = await outcome(unknown)
    assert judged == []
    assert isinstance(error, module._LacksCoding)
    assert await outcome(unknown, codings=True) == ([BAD], None)


async def test_a_surplus_answer_makes_the_last_one_doubtful() -> None:
    judged, error = await outcome(octets(Flaw.NONE, Flaw.NONE, Flaw.NONE), 2)
    assert judged == [FINE]
    assert (error.own_fault, error.lasting) == (False, False)


@pytest.mark.parametrize(
    ("code", "own_fault", "lasting"),
    [
        (-signal.SIGXCPU, True, True),
        (-signal.SIGKILL, False, False),
        (-signal.SIGSEGV, False, True),
        (0, False, True),
        (1, False, True),
    ],
)
async def test_the_exit_of_a_process_decides_whether_its_row_may_have_caused_it(
    code: int, own_fault: bool, lasting: bool
) -> None:
    peer = Peer(code)
    peer.end.shutdown(socket.SHUT_WR)
    judged, error = await _asked_after_its_end(peer)
    assert judged == []
    assert (error.own_fault, error.lasting) == (own_fault, lasting)
    await peer.close()


async def _asked_after_its_end(peer: Peer) -> tuple[list[Judgement], Any]:
    judged: list[Judgement] = []
    with pytest.raises(module._Ended) as caught:
        await peer.process.ask([content(10)], judged)
    error = caught.value.with_traceback(None)
    return judged, error


async def test_a_process_that_closes_its_socket_and_lives_has_five_seconds_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    timeout = asyncio.timeout

    def short(seconds: float) -> asyncio.Timeout:
        waited.append(seconds)
        return timeout(0.001)

    monkeypatch.setattr(asyncio, "timeout", short)
    peer = Peer(hangs=True)
    peer.end.shutdown(socket.SHUT_WR)
    judged, error = await _asked_after_its_end(peer)
    assert (judged, error.own_fault, error.lasting) == ([], False, False)
    assert waited == [5.0]
    await peer.close()


async def test_a_late_answer_is_a_fault_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_seconds", lambda _: 0.0005)
    peer = Peer()
    judged, error = await _asked_after_its_end(peer)
    assert (judged, error.own_fault, error.lasting) == ([], True, False)
    await peer.close()


@pytest.mark.parametrize(("code", "ended"), [(None, False), (0, True), (-9, True)])
async def test_a_process_has_ended_once_it_has_an_exit_code(code: int | None, ended: bool) -> None:
    peer = Peer()
    peer.process._process = cast(Any, SimpleNamespace(returncode=code, pid=4711, wait=peer._wait, kill=lambda: None))
    assert peer.process.ended is ended
    await peer.close()


async def test_each_row_is_sent_with_the_lengths_of_its_parts() -> None:
    peer = Peer()
    row = Content(MODULE, b"name", b"[]", b"x = 1")
    peer.end.sendall(octets(Flaw.NONE, Flaw.NONE))
    await peer.process.ask([row, row], [])
    sent = HEADER.pack(MODULE, 4, 2, 5) + b"name[]x = 1"
    assert peer.end.recv(1000) == sent * 2
    assert peer.process.octets == 2 * (row.size + 1)
    await peer.close()
