"""A limit of open files that does not suffice for the master's own work is refused at the start, with a remedy."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
from tests.support.server import FAST

from definition_server.control_plane.descriptors import descriptors_needed, too_few


def test_a_limit_that_suffices_is_accepted() -> None:
    for workers in (1, 2, 64, 512):
        assert too_few(descriptors_needed(workers), workers) is None
        assert too_few(descriptors_needed(workers) - 1, workers) is not None
        assert too_few(resource.RLIM_INFINITY, workers) is None


def test_the_usual_limit_suffices_for_the_workers_of_a_large_machine() -> None:
    assert too_few(1024, 64) is None


@pytest.mark.slow
def test_a_server_with_too_low_a_limit_does_not_start_and_says_what_to_do() -> None:
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
