"""The answer to a call without a handler, and the log lines about faults of the server; no test opens a connection."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.certificates import Authority
from tests.unit.grpc_h2.aio.test_call import Bench, Timer

from grpc_h2 import CertificateFault, Limits, MethodHandler, Server, TlsCredentials
from grpc_h2.aio.admission import Admission, Trust
from grpc_h2.aio.listener import Listener
from grpc_h2.aio.rate_limited_log import RateLimitedLog
from grpc_h2.aio.server import _timer_slack

LOG = logging.getLogger("grpc_h2")


class Refused(Bench):
    """A call on a server that was not started."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.server = Server(**options)
        self.server._loop = asyncio.get_running_loop()
        self.vouched: list[Trust] = []
        self.protocol.vouch = self.vouched.append

    def start(self) -> Any:
        """Begin the call. Returns the answer that the client received."""
        self.server.call_started(cast(Any, self.protocol), self.stream)
        return self.answered()


async def handle(request: bytes, context: Any) -> bytes:
    return request


class Services:
    """A generic handler that returns ``answer`` for every method, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def service(self, details: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("options", "prepare", "status", "text"),
    [
        ({}, lambda server: None, 12, b"Method not found!"),
        ({}, lambda server: server.add_generic_rpc_handlers([Services(None)]), 12, b"Method not found!"),
        ({"max_concurrent_calls": 0}, lambda server: None, 8, b"Concurrent RPC limit exceeded!"),
        ({}, lambda server: setattr(server, "_grace_over", True), 14, b"The server is stopping"),
        ({}, lambda server: server.add_generic_rpc_handlers([Services(KeyError())]), 2, b"Error in service handler!"),
    ],
    ids=["no handler", "nobody knows it", "too many calls", "stopping", "a bug"],
)
async def test_a_call_without_a_handler_is_answered_at_once(
    options: dict[str, Any], prepare: Callable[[Server], None], status: int, text: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    refused = Refused(**options)
    prepare(refused.server)
    result = refused.start()
    assert (result.status, result.text) == (status, text)
    assert refused.stream.finished
    assert refused.wakes == 1
    assert refused.vouched == [], "it shows nothing about its client"
    assert refused.server.open_calls == 0
    assert [record.message for record in caplog.records] == (["Exception looking for a handler"] if status == 2 else [])


@pytest.mark.parametrize("trust", [None, Trust.PROBE])
async def test_a_call_with_a_handler_is_counted_until_it_ends_and_vouches_for_its_client(
    trust: Trust | None,
) -> None:
    begun = Refused(**({} if trust is None else {"trust": lambda path: trust}))
    begun.server.add_generic_rpc_handlers([Services(None), Services(MethodHandler.unary(handle, bytes, bytes))])
    assert begun.start().status is None
    assert begun.server.open_calls == 1
    assert begun.vouched == [Trust.CLIENT if trust is None else trust]
    begun.context = begun.stream.call
    begun.send(b"abc", end=True)
    assert begun.context.task is not None
    await asyncio.wait((begun.context.task,))
    await asyncio.sleep(0)
    assert begun.server.open_calls == 0
    assert (begun.answered().messages, begun.answered().status) == ([b"abc"], 0)


async def test_an_exception_while_a_call_is_ended_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    refused = Refused()

    async def fail() -> None:
        raise KeyError("a bug")

    task = asyncio.create_task(fail())
    await asyncio.wait((task,))
    run = cast(Any, SimpleNamespace(threads=SimpleNamespace(running=None)))
    refused.server._calls.add(refused.context)
    refused.server._task_done(refused.context, run, task)
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.ERROR, "A call could not be ended")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)
    assert refused.server.open_calls == 0


SLACK = (
    "header_timeout", "keepalive_timeout", "max_connection_idle", "stall_timeout", "drain_timeout",
    "drain_body_timeout", "rest_timeout", "read_grace",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Limits) if field.name.endswith(("timeout", "grace", "idle"))]
)
def test_the_timer_slack_is_the_shortest_deadline_and_at_most_one_second(name: str) -> None:
    assert _timer_slack(Limits()) == 1.0
    more = {"drain_body_timeout": 0.25} if name == "body_timeout" else {}
    found = _timer_slack(Limits(**{name: 0.25, **more}))
    assert found == (0.25 if name in SLACK or more else 1.0)


# -- the log -----------------------------------------------------------------------------------------------------------


class Loop:
    """A loop that remembers its timers, and the descriptors that it no longer reads."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []
        self.removed: list[int] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(seconds, callback))
        return self.timers[-1]

    def remove_reader(self, descriptor: int) -> None:
        self.removed.append(descriptor)


@pytest.mark.parametrize(
    ("number", "message", "level", "lines"),
    [
        (errno.EMFILE, "Cannot accept connections for now", logging.ERROR, 1),
        (errno.ENFILE, "Cannot accept connections for now", logging.ERROR, 1),
        (errno.EPROTO, "Cannot accept a connection", logging.WARNING, 3),
    ],
)
def test_an_accept_error_is_logged_and_pauses_accepting_for_a_tenth_of_a_second(
    number: int, message: str, level: int, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as listening:
        listener = Listener(
            listening, policy=None, tls=None, objection=None, protocol=cast(Any, None), admission=Admission(),
            scheduler=cast(Any, None), handshake_timeout=1.0, client_log=RateLimitedLog(LOG),
        )  # fmt: skip
        loop = Loop()
        listener._loop = cast(Any, loop)
        for _ in range(3):
            listener._cannot_accept(OSError(number, os.strerror(number)))
        assert [timer.when for timer in loop.timers] == [0.1] * 3
        assert loop.removed == [listening.fileno()] * 3
    assert [(record.levelno, record.message) for record in caplog.records] == [(level, message)] * lines
    assert os.strerror(number) in cast(Any, caplog.records[0]).error


class Established:
    """A protocol with a transport."""

    established = True


async def test_a_bug_while_a_connection_is_set_up_is_logged_and_its_cancellation_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise KeyError("a bug")

    with socket.socket() as listening, socket.socket() as connection:
        listener = Listener(
            listening, policy=None, tls=None, objection=None, protocol=cast(Any, None), admission=Admission(),
            scheduler=cast(Any, None), handshake_timeout=1.0, client_log=RateLimitedLog(LOG),
        )  # fmt: skip
        protocol = cast(Any, Established())
        failed, cancelled = asyncio.create_task(fail()), asyncio.create_task(asyncio.sleep(9))
        cancelled.cancel()
        await asyncio.wait((failed, cancelled))
        for task in (failed, cancelled):
            listener._setups[protocol] = task
            listener._waiting.add(protocol)
            listener._set_up(protocol, connection, task)
            assert not listener.busy
            assert not listener._waiting
            assert connection.fileno() >= 0, "an established connection is closed by its transport"
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.ERROR, "A connection was not established")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


def test_the_number_of_omitted_log_lines_is_reported_ten_seconds_later_or_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop, log = Loop(), RateLimitedLog(LOG)
    log.report_later(cast(Any, loop))
    for number in range(25):
        log.log(1000.0, logging.WARNING, "A client was cut off", lambda: "x", number=number)
    assert [timer.when for timer in loop.timers] == [10.0], "once for all"
    loop.timers[0].callback()
    record = caplog.records[-1]
    assert (record.levelno, record.message, cast(Any, record).left_out) == (
        logging.WARNING, "Lines about clients were left out", 5,
    )  # fmt: skip
    count = len(caplog.records)
    log.close()
    assert len(caplog.records) == count, "nothing is left to report"
    log.log(1000.0, logging.WARNING, "A client was cut off", lambda: "x")
    log.close()
    assert cast(Any, caplog.records[-1]).left_out == 1
    assert loop.timers[1].cancelled


def test_a_reloaded_certificate_is_logged_and_an_unusable_one_does_not_replace_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Authority(tmp_path).sign("server")
    credentials = TlsCredentials(made.cert, made.key)
    first = credentials.context
    with caplog.at_level(logging.INFO, "grpc_h2"):
        credentials.reload()
    (record,) = caplog.records
    assert (record.message, cast(Any, record).file) == ("Certificate loaded", str(made.cert))
    assert credentials.context is not first
    second = credentials.context
    made.key.write_text("no key")
    with pytest.raises(CertificateFault, match=str(made.cert)):
        credentials.reload()
    assert caplog.records[-1].message == "The certificate was not replaced"
    assert credentials.context is second
