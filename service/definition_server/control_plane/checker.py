"""The master's side of the checker, a process that compiles rows. It is started when it is needed, and stopped when it
is idle.

The process is not trusted: its answers are validated, and it is killed after a late or invalid one. The row that the
process was judging then is judged once more, alone in a new process, unless the row had used up its CPU time. So no row
is refused because of the effects of earlier rows. A row that ends the checker twice is refused, because it would end a
client process too.

A *patient* checker judges rows that are served already, while workers answer calls. Its process has the scheduling
policy SCHED_IDLE: a worker that wakes up gets the CPU at once, whereas with a nice value alone the process would finish
its time slice of milliseconds first (sched(7)). Its answers are collected every `POLL_SECONDS`, so that the master's
event loop does not take CPU time from the workers for each answer. The process pauses until the next rows are sent.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from asyncio.subprocess import Process
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from definition_server.catalog.content_check import ANSWER, READY, Flaw
from definition_server.control_plane.checker_process import CODINGS, HEADER, command, cpu_seconds
from definition_server.environment import inherited_environment
from definition_server.inherited import signals_held_back

START_SECONDS = 15.0
IDLE_SECONDS = 300.0
"""An idle process is stopped after this time. It is longer than several sync intervals, so that a table that changes
now and then does not need a new process each time.
"""
_WALL_PER_CPU_SECOND = 10
"""A row may take so many seconds of real time for each second of CPU time that it is granted: the checker's priority is
low, and CPUs may be busy.
"""
_MOST_OCTETS = 256 * 1024 * 1024
"""A process that has judged so many octets of source is replaced, because the names in compiled code stay in its
memory.
"""
_NICENESS = 10
_LOWEST = 19
POLL_SECONDS = 0.02
WINDOW_ROWS, WINDOW_OCTETS = 64, 1024 * 1024
"""So many rows, or about so many octets, are sent before an answer is awaited."""
_PLAIN = frozenset(range(ANSWER, ANSWER + Flaw.EXHAUSTED))
"""The answers after which the same process continues to judge."""


class Content(NamedTuple):
    """The parts of one row that are judged."""

    checks: int
    """`content_check.MODULE` and others."""
    name: bytes
    interface: bytes
    code: bytes

    @property
    def size(self) -> int:
        """Octets."""
        return len(self.name) + len(self.interface) + len(self.code)


class Judgement(NamedTuple):
    """The answer for one row."""

    flaws: Flaw
    lasting: bool = True
    """False if the row need not be the cause (the kernel may have lacked memory, or the process was killed). Then the
    answer is not remembered.
    """


class CannotCheck(Exception):
    """No checker can be started. The message gives the reason."""


class _Ended(Exception):
    """The process ended or was killed while it judged a row."""

    def __init__(self, *, own_fault: bool, lasting: bool) -> None:
        super().__init__()
        self.own_fault = own_fault
        """Whether only the row can be the cause."""
        self.lasting = lasting


class _LacksCoding(Exception):
    """A row declares an encoding that the process has not loaded."""


class Checker:
    """Judges contents, in order. One call runs at a time; further calls wait."""

    def __init__(
        self,
        jail: str = "auto",
        *,
        patient: bool = False,
        program: Callable[[int, str], list[str]] = command,
        idle_seconds: float = IDLE_SECONDS,
        wall_per_cpu_second: float = _WALL_PER_CPU_SECOND,
    ) -> None:
        """
        Args:
            jail: The setting ``JAIL``.
            patient: Whether this checker judges rows that are served already.
            program: Takes the descriptor of the process's socket and ``jail``, and returns the command line of the
                process.
            idle_seconds: The process is stopped after this time without work.
            wall_per_cpu_second: Seconds of real time that a row may take for each second of CPU time that it is
                granted.
        """
        self._jail = jail
        self._patient = patient
        self._program = program
        self._idle_seconds = idle_seconds
        self._wall = wall_per_cpu_second
        self._low_priority = False
        self._codings = False
        """Whether a row has declared an uncommon encoding. From then on each new process loads all encodings."""
        self._process: _CheckerProcess | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._busy = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()
        self.started = 0
        """Number of processes started so far."""

    @property
    def pid(self) -> int | None:
        """Process id of the running checker; None if none runs."""
        return None if self._process is None else self._process.pid

    def lower_priority(self) -> None:
        """Lower the priority below that of the workers. It cannot be raised again."""
        self._low_priority = True
        if self._process is not None:
            self._process.lower_priority()

    async def prepare(self) -> None:
        """Start the process, so that the first check does not wait for its start. A failure is raised by the first
        check.
        """
        async with self._busy:
            with suppress(CannotCheck):
                await self._running()
            self._rest()

    async def check(self, contents: Sequence[Content]) -> list[Judgement]:
        """The judgement of each of ``contents``.

        Raises:
            CannotCheck: if no process can be started.
        """
        async with self._busy:
            judged: list[Judgement] = []
            try:
                while len(judged) < len(contents):
                    await self._judge(contents, judged)
            except BaseException:
                self._stop()  # its next answers would be taken for those to other rows
                raise
            finally:
                self._rest()
            return judged

    async def close(self) -> None:
        """End the process. No other method may be called afterwards."""
        if self._idle is not None:
            self._idle.cancel()
        self._stop()
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _judge(self, contents: Sequence[Content], judged: list[Judgement]) -> None:
        """Append judgements until all contents are judged or a row needs another process. A row that ended this process
        is judged again, alone.
        """
        process = await self._running()
        first = not process.octets
        begun = len(judged)
        try:
            await process.ask(contents[begun:], judged)
            if process.octets > _MOST_OCTETS:
                self._stop()
            return
        except _LacksCoding:
            self._load_codings()
            return
        except _Ended as ended:
            self._stop()
            # If the process was killed (`lasting` is false), it may have ended before it received the row.
            alone = first and len(judged) == begun and ended.lasting
            if ended.own_fault or alone:
                judged.append(Judgement(Flaw.CODE, ended.lasting))
                return
        await self._judge_alone(contents[len(judged)], judged)

    async def _judge_alone(self, content: Content, judged: list[Judgement]) -> None:
        process = await self._running()
        try:
            await process.ask([content], judged)
        except _LacksCoding:
            self._load_codings()
        except _Ended as ended:
            self._stop()
            judged.append(Judgement(Flaw.CODE, ended.lasting))

    def _load_codings(self) -> None:
        """Stop this process, and continue with one that loads all encodings."""
        self._codings = True
        self._stop()

    async def _running(self) -> _CheckerProcess:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._process is None or self._process.ended:
            self._stop()
            self.started += 1
            self._process = await _CheckerProcess.start(
                self._program, self._jail, self._wall, patient=self._patient, codings=self._codings
            )
            if self._low_priority:
                self._process.lower_priority()
        return self._process

    def _rest(self) -> None:
        """Stop the process unless it is used again soon."""
        if self._process is not None:
            self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self._stop)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            task = asyncio.get_running_loop().create_task(process.end())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)


class _CheckerProcess:
    """One process."""

    def __init__(
        self, process: Process, end: socket.socket, wall_per_cpu_second: float, *, patient: bool, codings: bool
    ) -> None:
        self._process = process
        self._codings = codings
        self._end = end
        self._poll_seconds = POLL_SECONDS if patient else None
        self._wall = wall_per_cpu_second
        self._received = bytearray()
        """Answers that were received, but not yet returned by `_receive`."""
        self._closed = self._late = False
        """Whether no more answers will come: the socket is closed, or an answer was late."""
        self.octets = 0
        """Octets of source that were sent to the process."""

    @classmethod
    async def start(
        cls, program: Callable[[int, str], list[str]], jail: str, wall: float, *, patient: bool, codings: bool
    ) -> _CheckerProcess:
        """A process that has confined itself and passed its self-test.

        Raises:
            CannotCheck: if no process can be started.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise CannotCheck(f"no checker process can be started: {error.strerror}") from None
        try:
            ours.setblocking(False)
            with signals_held_back():
                process = await asyncio.create_subprocess_exec(
                    *program(theirs.fileno(), jail),
                    *((CODINGS,) if codings else ()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=inherited_environment(("LD_LIBRARY_PATH",), ()),
                )
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            ours.close()
            raise CannotCheck(f"no checker process can be started: {error}") from None
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        started = cls(process, ours, wall, patient=patient, codings=codings)
        try:
            answer = await started._receive([START_SECONDS])
        except BaseException as error:
            await started.end()
            if isinstance(error, _Ended):
                raise CannotCheck("the checker process ended or hung at its start") from None
            raise
        if answer != READY[0]:
            await started.end()
            raise CannotCheck("the checker process answered something else at its start")
        if patient:  # only now: on busy CPUs it would not start in time
            started.give_way_at_once()
        return started

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process has ended by itself."""
        return self._process.returncode is not None

    def lower_priority(self) -> None:
        """Lower the process's priority. It cannot be raised again."""
        with suppress(OSError):  # the process has ended already
            os.setpriority(os.PRIO_PROCESS, self.pid, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)

    def give_way_at_once(self) -> None:
        """From now on, run only while no other process needs the CPU; if that is refused, have the lowest priority."""
        try:
            os.sched_setscheduler(self.pid, os.SCHED_IDLE, os.sched_param(0))
        except ProcessLookupError:
            return
        except OSError:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self.pid, _LOWEST)

    async def end(self) -> None:
        """Kill and reap it."""
        self._end.close()
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()

    async def ask(self, contents: Sequence[Content], judged: list[Judgement]) -> None:
        """Append the judgement of each of ``contents`` to ``judged``.

        Raises:
            _Ended: the process ended at the first row without a judgement, or sent an invalid answer.
            _LacksCoding: that row declares an encoding that the process has not loaded.
        """
        for window in _windows(contents):
            await self._ask_window(window, judged)

    async def _ask_window(self, window: Sequence[Content], judged: list[Judgement]) -> None:
        sending = asyncio.ensure_future(self._send(window))
        limits = [self._wall * cpu_seconds(content.size) for content in window]
        try:
            for number, content in enumerate(window):
                fresh = not self.octets
                self.octets += content.size + 1
                octet = await self._receive(limits[number:] if not self._received else ())
                if not ANSWER <= octet < ANSWER + 2 * Flaw.UNKNOWN_CODING:
                    raise _Ended(own_fault=False, lasting=True)
                flaws = Flaw(octet - ANSWER)
                if flaws & Flaw.EXHAUSTED and not fresh:
                    raise _Ended(own_fault=False, lasting=True)
                if flaws & Flaw.UNKNOWN_CODING and not self._codings:
                    raise _LacksCoding
                judged.append(Judgement(flaws & ~(Flaw.EXHAUSTED | Flaw.UNKNOWN_CODING)))
            if self._received:  # unexpected octets: the last answer cannot be trusted either
                judged.pop()
                raise _Ended(own_fault=False, lasting=False)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, window: Sequence[Content]) -> None:
        loop = asyncio.get_running_loop()
        pieces = []
        for content in window:
            header = HEADER.pack(content.checks, len(content.name), len(content.interface), len(content.code))
            pieces.append(b"".join((header, content.name, content.interface, content.code)))
        with suppress(OSError):  # the process has ended: `_receive` notices that
            await loop.sock_sendall(self._end, b"".join(pieces))

    async def _receive(self, limits: Sequence[float]) -> int:
        """The next octet. ``limits``: the time limits of the awaited answers in seconds, in the order of the
        answers.
        """
        if not self._received:
            if not self._late and not self._closed:
                await self._await_answers(limits)
            if not self._received:
                raise _Ended(own_fault=True, lasting=False) if self._late else await self._how_it_ended()
        return self._received.pop(0)

    async def _await_answers(self, limits: Sequence[float]) -> None:
        """Wait until all awaited answers have arrived, or one that needs attention has, or no more will arrive.

        The waiting task is woken once for all answers, because each wake-up costs the event loop more than an answer
        does.
        """
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        deadline = loop.time() + limits[0]
        timer = loop.call_at(deadline, lambda: check_time())

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def take() -> None:
            nonlocal deadline
            try:
                octets = self._end.recv(4096)
            except BlockingIOError:
                return
            except OSError:
                octets = b""
            self._closed = not octets
            self._received += octets
            if not octets or len(self._received) >= len(limits) or not _PLAIN.issuperset(octets):
                finish()
            else:
                deadline = loop.time() + limits[len(self._received)]

        def check_time() -> None:
            nonlocal timer
            self._late = loop.time() >= deadline
            if self._late:
                finish()
            else:
                timer = loop.call_at(deadline, check_time)

        try:
            if self._poll_seconds is None:
                loop.add_reader(self._end, take)
                await done
            while not done.done():
                await asyncio.sleep(self._poll_seconds or 0)
                take()
        finally:
            loop.remove_reader(self._end)
            timer.cancel()

    async def _how_it_ended(self) -> _Ended:
        try:
            async with asyncio.timeout(5.0):
                code = await self._process.wait()
        except TimeoutError:  # it has closed its socket, but still runs
            return _Ended(own_fault=False, lasting=False)
        return _Ended(own_fault=code == -signal.SIGXCPU, lasting=code != -signal.SIGKILL)


def _windows(contents: Sequence[Content]) -> Iterator[Sequence[Content]]:
    """``contents`` in pieces that are each sent at once. The answers to a piece must fit into the socket's buffer."""
    begin = octets = 0
    for position, content in enumerate(contents):
        if position - begin == WINDOW_ROWS or (position > begin and octets + content.size > WINDOW_OCTETS):
            yield contents[begin:position]
            begin, octets = position, 0
        octets += content.size
    if begin < len(contents):
        yield contents[begin:]
