"""Open files for the master's own work: too low a limit is refused at the start, and some files are reserved."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from tests.support.leftovers import descriptors_before, open_descriptors
from tests.support.server import FAST

from definition_server.control_plane.descriptors import DescriptorReserve, descriptors_needed, too_few


def test_a_sufficient_descriptor_limit_is_accepted() -> None:
    for workers in (1, 2, 64, 512):
        assert too_few(descriptors_needed(workers), workers) is None
        assert too_few(descriptors_needed(workers) - 1, workers) is not None
        assert too_few(resource.RLIM_INFINITY, workers) is None


@pytest.mark.parametrize(("workers", "needed"), [(1, 64), (2, 73), (64, 640), (512, 4736)])
def test_48_files_and_8_for_each_worker_are_needed_and_an_eighth_more_for_the_admin_port(
    workers: int, needed: int
) -> None:
    assert descriptors_needed(workers) == needed


def test_the_usual_limit_suffices_for_the_workers_of_a_large_machine() -> None:
    assert too_few(1024, 64) is None


@pytest.fixture
def few() -> Iterator[None]:
    """Limit this process to ten more files than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 11, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def take_all() -> list[int]:
    taken = []
    with suppress(OSError):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    return taken


def give_back(taken: list[int]) -> None:
    while taken:
        os.close(taken.pop())


@pytest.mark.usefixtures("few")
def test_reserved_descriptors_are_free_only_within_the_blocks() -> None:
    reserve = DescriptorReserve(4)
    others = take_all()
    with pytest.raises(OSError, match="Too many"):
        os.pipe()
    with reserve.lent():
        give_back(list(os.pipe()))
        with reserve.lent():
            give_back(list(os.pipe()))
        give_back(list(os.pipe()))
    with pytest.raises(OSError, match="Too many"):
        os.pipe()
    reserve.close()
    give_back(list(os.pipe()))
    give_back(others)


@pytest.mark.usefixtures("few")
def test_an_incomplete_reserve_is_logged_once_and_filled_later(capsys: pytest.CaptureFixture[str]) -> None:
    reserve = DescriptorReserve(4)
    with reserve.lent():
        others = take_all()
        os.close(others.pop())
    for _ in range(3):
        with reserve.lent():
            pass
    logged = capsys.readouterr().out
    assert logged.count("Open files run out: the reserve for workers and cycles is not complete") == 1
    give_back(others)
    with reserve.lent():
        pass
    assert "The reserve of open files is complete again" in capsys.readouterr().out
    others = take_all()
    with reserve.lent():
        free = take_all()
        assert len(free) == 4
        give_back(free)
    reserve.close()
    give_back(others)


@pytest.mark.usefixtures("few")
def test_a_block_that_ends_after_the_reserve_was_closed_reserves_nothing_again() -> None:
    before = descriptors_before()
    reserve = DescriptorReserve(4)
    assert len(open_descriptors()) == len(before) + 4
    with reserve.lent():
        reserve.close()
    assert open_descriptors() == before


@pytest.mark.slow
def test_a_server_with_too_low_a_limit_does_not_start_and_names_a_remedy() -> None:
    environment = os.environ | FAST | {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    ended = subprocess.run(
        ["sh", "-c", 'ulimit -n 40; exec "$0" -m definition_server serve', sys.executable],
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 78
    line = json.loads(ended.stdout.splitlines()[-1])
    assert line["msg"] == "Cannot start"
    assert "the limit of open files is 40" in line["error"]
    assert "ulimit -n" in line["error"]


@pytest.mark.parametrize(("workers", "needed"), [(1, 64), (2, 73), (8, 128), (64, 640)])
def test_the_descriptors_that_are_needed_leave_an_eighth_to_the_admin_port(workers: int, needed: int) -> None:
    assert descriptors_needed(workers) == needed
    assert too_few(needed, workers) is None
    assert too_few(-1, workers) is None
    fault = too_few(needed - 1, workers)
    assert fault is not None
    assert f"the limit of open files is {needed - 1}, and {needed} are needed for {workers} workers" in fault
