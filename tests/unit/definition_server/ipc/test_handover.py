"""The time limits of a swap: workers release a replaced snapshot before the master does."""

from __future__ import annotations

from pathlib import Path

import pytest

from definition_server.ipc import handover


def test_workers_release_a_snapshot_before_the_master_does() -> None:
    assert handover.PREPARATION_SECONDS + handover.RELEASE_SECONDS < handover.HOLD_SECONDS


def test_limits_in_another_relation_stop_the_import() -> None:
    source = Path(handover.__file__).read_text(encoding="utf-8")
    changed = source.replace("HOLD_SECONDS = 2.0", "HOLD_SECONDS = 1.5")
    assert changed != source
    with pytest.raises(AssertionError, match="the master must release a snapshot after its workers"):
        exec(compile(changed, handover.__file__, "exec"), {})
