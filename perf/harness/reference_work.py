"""Fixed work whose CPU time measures the speed of this interpreter and this kernel at this moment.

The number of calls that a core serves depends on the server's code, on the interpreter that runs it, and on the kernel
and the CPU below both. The gates must judge only the code. So the speed of interpreter and kernel is measured during
every run that a gate normalises (`sla.Gate.expected`): in short bursts on the server's CPU, by the server's
interpreter, as CPU time, in a separate process. If another program uses the other hardware thread of the CPU, the CPU's
speed changes within a second, by half or more for Python and by a quarter for the kernel, so a measurement made a
second before a run does not describe the run.

**The interpreter** (`python_us`). The same bytecode takes 1.1 to 1.6 times as long if the interpreter was built without
profile-guided optimization (PGO); the speed of a program in C does not change. The work has the same mix of opcodes as
the engine's fast path (``FastPath.answer_one`` and ``answer_batch``). Shares of the opcodes executed for one call,
counted with ``sys.settrace`` and ``f_trace_opcodes`` on CPython 3.11:

===================================  ==========  ==========  =========
opcodes                              in a batch  one by one  this work
===================================  ==========  ==========  =========
LOAD_FAST, STORE_FAST                       43%         32%        37%
LOAD_ATTR, LOAD_METHOD, STORE_ATTR          10%         22%        14%
PRECALL, CALL                               12%         10%        13%
comparisons and jumps                       14%         14%        14%
BINARY_OP (int arithmetic)                   5%          3%         3%
BUILD_SLICE, BINARY_SUBSCR                   4%          3%         4%
all together, opcodes a call                189         293        182
===================================  ==========  ==========  =========

The built-in functions are also the same: slices of ``bytes``, ``dict.get``, ``Struct.unpack_from``, ``bytes.join``,
``list.append``. The work shares no code with the server, because a slower server must not slow down its own measure.

**The kernel** (`kernel_us`). System calls and TCP take a third (batches) to two thirds (one call at a time) of a call's
CPU time. This part does not depend on the build of the interpreter. The work sends as many octets as an answer has over
a TCP connection on the loopback and reads them.

``python perf/harness/reference_work.py`` makes a burst of both every `PAUSE_SECONDS` until its standard input ends, and
then prints all bursts: ``[[when, python_us, kernel_us], …]``, the time of ``time.monotonic`` and microseconds of CPU
time for one call and for one message. A burst takes about 2 ms.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
from collections.abc import Callable
from time import monotonic, process_time_ns

PAUSE_SECONDS = 0.010

_BATCH = 32
_BLOCK = b"b" * 12
_HEADERS, _DATA = b"\x00\x00\x0c\x01\x04", b"\x00\x00\x12\x00\x01"
_HEAD_OCTETS = 9
_ANSWER_OCTETS = 1500
_DEFINITIONS = 256
_ROUNDS, _MESSAGES = 10, 100
_UNPACK = struct.Struct(f">5xI{len(_BLOCK)}s5sI").unpack_from
_SHAPES = {_HEADERS: (_UNPACK, 2 * _HEAD_OCTETS + len(_BLOCK))}
_LENGTHS = {_DATA: 18}


class _Answer:
    __slots__ = ("number", "pieces", "size")

    def __init__(self, number: int) -> None:
        self.number = number
        self.pieces = (b"h" * 9, b"d" * 40, b"m" * _ANSWER_OCTETS, b"t" * 2)
        self.size = sum(map(len, self.pieces))


class _Route:
    __slots__ = ("answer", "length")

    def __init__(self, answers: dict[bytes, _Answer]) -> None:
        self.answer: Callable[[bytes], _Answer] = answers.__getitem__
        self.length = -1


class _Times:
    __slots__ = ("asked_at", "idle_at", "read_at")

    def __init__(self) -> None:
        self.read_at = self.idle_at = self.asked_at = 0.0

    def reset(self) -> None:
        self.asked_at = 0.0


class _State:
    __slots__ = ("_held", "_memo", "_most", "_now", "_paused", "_times", "answered", "last", "open", "out", "window")

    def __init__(self, routes: dict[bytes, _Route]) -> None:
        self._memo = routes
        self._held = b""
        self._most = 1 << 30
        self._now = 0.0
        self._paused = False
        self._times = _Times()
        self.answered: list[int] = []
        self.last = -1
        self.open: dict[int, _Route] = {}
        self.out: list[bytes] = []
        self.window = 1 << 60

    def serve_batch(self, data: bytes) -> bytes:
        """Parse many requests and assemble their answers."""
        memo, answered, push, window, most = self._memo, self.answered, self.out.append, self.window, self._most
        position, end, expected, received = 0, len(data), self.last + 2, 0
        while len(answered) < most and window >= 0:
            shape = _SHAPES.get(data[position : position + 5])
            if shape is None:
                break
            body = position + shape[1]
            if body > end or len(self.open) >= most:
                break
            stream, block, head, other = shape[0](data, position)
            route = memo.get(block)
            if stream != expected or route is None:
                break
            expected += 2
            length = _LENGTHS.get(head)
            if length is None or other != stream or body + length > end:
                break
            answer = None
            if route.answer is not None and route.length in (length, -1):
                answer = route.answer(data[body : body + length])
            if answer is None or answer.pieces is None or answer.size > window:
                break
            push(data[body - 4 : body].join(answer.pieces))
            answered.append(answer.number)
            window -= answer.size
            received += length
            position = body + length
        self.window, self.last = window, expected - 2
        octets = b"".join(self.out)
        self.out.clear()
        answered.clear()
        return octets

    def serve_one(self, data: bytes, now: float) -> bytes | None:
        """Parse one request that arrives alone, and assemble its answer: this checks and updates more of the state."""
        shape = _SHAPES.get(data[:5])
        if shape is None or self._held or self._paused:
            return None
        times, body = self._times, shape[1]
        if len(data) < body or self.out or self._held or self.open or len(self.open) >= self._most or self._now > now:
            return None
        stream, block, head, other = shape[0](data, 0)
        length = _LENGTHS.get(head)
        if length is None or body + length != len(data):
            return None
        if not stream == other <= 1 << 30:
            return None
        route = self._memo.get(block)
        if route is None or route.answer is None or route.length not in (length, -1):
            return None
        answer = route.answer(data[body:])
        if answer is None or answer.pieces is None or answer.size > self.window:
            return None
        self.window -= answer.size
        times.reset()
        self._now = times.read_at = times.idle_at = now
        self.answered.append(answer.number)
        octets = data[body - 4 : body].join(answer.pieces)
        self.answered.clear()
        return octets


def python_work() -> Callable[[], int]:
    """A function that serves `_ROUNDS` batches, and as many calls one by one; it returns the number of calls."""
    names = [b"name-%06d-------" % number for number in range(_DEFINITIONS)]
    state = _State({_BLOCK: _Route({name: _Answer(number) for number, name in enumerate(names)})})
    requests = []
    for number in range(_BATCH):
        stream = struct.pack(">I", 2 * number + 1)
        requests.append(_HEADERS + stream + _BLOCK + _DATA + stream + names[number * 7])
    batch = b"".join(requests)
    octets = _BATCH * (_ANSWER_OCTETS + 9 + 40 + 2 + 3 * 4)

    def work() -> int:
        for _ in range(_ROUNDS):
            state.last = -1
            if len(state.serve_batch(batch)) != octets:
                raise AssertionError("the reference work gives a wrong answer")
            for request in requests:
                state.serve_one(request, 0.0)
        return 2 * _ROUNDS * _BATCH

    return work


def kernel_work(near: socket.socket, far: socket.socket) -> Callable[[], int]:
    """A function that sends `_MESSAGES` messages from one end of a connection to the other; it returns their number."""
    message, buffer = bytes(_ANSWER_OCTETS), bytearray(2 * _ANSWER_OCTETS)

    def work() -> int:
        for _ in range(_MESSAGES):
            near.send(message)
            far.recv_into(buffer)
        return _MESSAGES

    return work


def each_us(work: Callable[[], int], clock: Callable[[], int] = process_time_ns) -> float:
    """Microseconds of CPU time for each item of ``work``."""
    began = clock()
    count = work()
    return (clock() - began) / count / 1000


def bursts() -> list[tuple[float, float, float]]:
    """Work until standard input ends. Returns (time, ``python_us``, ``kernel_us``) of each burst."""
    found = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]
    with near, far:
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        python, kernel = python_work(), kernel_work(near, far)
        python(), kernel()
        while not select.select([sys.stdin], [], [], PAUSE_SECONDS)[0]:
            found.append((monotonic(), each_us(python), each_us(kernel)))
    return found


if __name__ == "__main__":
    print(json.dumps(bursts()))
