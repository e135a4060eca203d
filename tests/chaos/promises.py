"""Promises in process and machine drills that clients cannot observe, and how to check them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from subprocess import TimeoutExpired

from tests.chaos.drills.stage import Stage
from tests.support.polling import until
from tests.support.server import ServerProcess

PROMISED_SECONDS = 45.0
"""The longest back-off of a worker that keeps dying is 30 s; everything else happens sooner, even on a busy machine."""
PATIENT_SECONDS = 30.0
"""The deadline of calls if the whole server is down for a while: clients that must lose no call wait this long."""


def server_of(stage: Stage) -> ServerProcess:
    """The stage's server; the stage must have started it."""
    assert stage.server is not None, "process faults are for a server that the drill has started itself"
    return stage.server


class PromiseBroken(Exception):
    """The server broke a promise; the drill ends."""


def must(stage: Stage, what: Callable[[], object], sentence: str, seconds: float | None = None) -> None:
    """Wait for an effect that the server promises, by default for `PROMISED_SECONDS`.

    Raises: PromiseBroken: it does not happen. This is also noted on the stage, so that the verdict is not `invalid`.
    """
    seconds = PROMISED_SECONDS if seconds is None else seconds
    try:
        until(what, sentence, seconds=seconds)
    except AssertionError:
        stage.broken.append(f"not within {seconds:g} s: {sentence}")
        raise PromiseBroken(sentence) from None


def all_serve(stage: Stage, *, without: Iterable[int] = ()) -> bool:
    """Whether, by ``/statusz``, every worker serves the published snapshot and no worker is one of ``without``."""
    try:
        status = server_of(stage).statusz()
    except (OSError, ValueError):
        return False
    workers, published = status["workers"], status["catalog"]["generation"]
    return all(each["state"] == "serving" and each["generation"] == published for each in workers) and {
        each["pid"] for each in workers
    }.isdisjoint(without)


def must_be_replaced(stage: Stage, victims: Iterable[int]) -> None:
    """Wait until all workers serve, none of them one of ``victims``."""
    victims = set(victims)
    must(stage, lambda: all_serve(stage, without=victims), "every worker that went is replaced by one that serves")


def must_publish(stage: Stage, when: str) -> None:
    """Write a version and check that all workers serve it within a cycle."""
    assert stage.load is not None
    assert stage.table is not None
    version = stage.table.advance()
    load = stage.load
    must(stage, lambda: load.everywhere(version), f"a version that is written {when} is served", stage.cycle_seconds)
    must(stage, lambda: all_serve(stage), f"all workers report the version that was written {when}", 1)


def exit_code(server: ServerProcess) -> int | None:
    """Exit code of a server that is about to exit; None if it does not exit."""
    with suppress(TimeoutExpired):
        return server.wait_exit()
    return None


def patient(stage: Stage) -> Stage:
    """The stage with clients that wait long enough for a server to be restarted."""
    stage.job = replace(stage.job or stage.default_job(), deadline_seconds=PATIENT_SECONDS)
    return stage
