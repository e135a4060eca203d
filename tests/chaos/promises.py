"""What a server must do in process and machine drills, beside what its clients see; and how to look."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from subprocess import TimeoutExpired

from tests.chaos.drills.stage import Stage
from tests.support.polling import until
from tests.support.server import ServerProcess

PROMISED_SECONDS = 45.0
"""The longest back-off of a worker that keeps dying is 30 s; all else comes sooner, even on a busy machine."""
PATIENT_SECONDS = 30.0
"""The deadline of calls where the whole server is away for a while: who is to lose nothing must wait so long."""


def server_of(stage: Stage) -> ServerProcess:
    """The server, which must be one that the stage started."""
    assert stage.server is not None, "process faults are for a server that the drill has started itself"
    return stage.server


class PromiseBroken(Exception):
    """The server did not do what it promises; the drill ends there."""


def must(stage: Stage, what: Callable[[], object], sentence: str, seconds: float | None = None) -> None:
    """Wait for what the server promises, for `PROMISED_SECONDS` unless told otherwise.

    Raises:
        PromiseBroken: where it does not come. Noted on the stage too, lest the verdict be `invalid`.
    """
    seconds = PROMISED_SECONDS if seconds is None else seconds
    try:
        until(what, sentence, seconds=seconds)
    except AssertionError:
        stage.broken.append(f"not within {seconds:g} s: {sentence}")
        raise PromiseBroken(sentence) from None


def all_serve(stage: Stage, *, without: Iterable[int] = ()) -> bool:
    """Whether ``/statusz`` tells that every worker serves what is published, and that none is of ``without``."""
    try:
        status = server_of(stage).statusz()
    except (OSError, ValueError):
        return False
    workers, published = status["workers"], status["catalog"]["generation"]
    return all(each["state"] == "serving" and each["generation"] == published for each in workers) and {
        each["pid"] for each in workers
    }.isdisjoint(without)


def must_be_replaced(stage: Stage, victims: Iterable[int]) -> None:
    """All workers serve, without ``victims``."""
    victims = set(victims)
    must(stage, lambda: all_serve(stage, without=victims), "every worker that went is replaced by one that serves")


def must_publish(stage: Stage, when: str) -> None:
    """A version that is written now is served within a cycle, by all workers."""
    assert stage.load is not None
    assert stage.table is not None
    version = stage.table.advance()
    load = stage.load
    must(stage, lambda: load.everywhere(version), f"a version that is written {when} is served", stage.cycle_seconds)
    must(stage, lambda: all_serve(stage), f"all workers tell that they serve what was written {when}", 1)


def exit_code(server: ServerProcess) -> int | None:
    """Of a server that is about to end; None where it does not."""
    with suppress(TimeoutExpired):
        return server.wait_exit()
    return None


def patient(stage: Stage) -> Stage:
    """The stage, with clients that wait long enough for a server that is started anew."""
    stage.job = replace(stage.job or stage.default_job(), deadline_seconds=PATIENT_SECONDS)
    return stage
