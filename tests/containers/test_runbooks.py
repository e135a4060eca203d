"""The commands of the runbooks, in the image: it has the programs, and a hardened server answers.

`tests/deploy/test_prometheus_runbooks.py` runs all of them, on this machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.containers.engine import ROOT
from tests.support.pages import blocks

if TYPE_CHECKING:
    from tests.containers.conftest import StartContainer
    from tests.containers.engine import Running

VALUES = {"HOST": "127.0.0.1", "get if": "get command0"}
ELSEWHERE = ("OLD NEW", "authority.pem")
"""Placeholders whose values this server does not have: one version in its history, and no TLS."""
KEPT = "/var/lib/definition-server"


@pytest.fixture
def server(start: StartContainer) -> Running:
    running = start(options={"tmpfs": {KEPT: "mode=1777"}}, SNAPSHOT_DIR=KEPT)
    running.wait_log("Control socket open")
    running.wait_log("Definitions Broadcasted")
    return running


def test_every_command_of_the_runbooks_runs_in_the_image(server: Running) -> None:
    found = [block.text for page in sorted((ROOT / "docs/runbooks").glob("*.md")) for block in blocks(page, "sh")]
    for old, new in VALUES.items():
        found = [text.replace(old, new) for text in found]
    # Equal blocks run once, and lines for another server are left out.
    kept = {"\n".join(x for x in text.splitlines() if not any(each in x for each in ELSEWHERE)) for text in found}
    assert len(kept) > 8
    for text in sorted(kept):
        server.execute("bash", "-euo", "pipefail", "-c", text)


@pytest.mark.parametrize("program", ["curl", "jq", "ss", "dmesg"])
def test_a_program_that_the_image_does_not_have_is_detected(server: Running, program: str) -> None:
    with pytest.raises(AssertionError):
        server.execute("bash", "-c", program)
