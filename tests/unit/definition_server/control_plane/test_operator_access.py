"""The operators' access to the master: whether it is offered, and the notices that accompany the status."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from definition_server.control_plane.operator_access import OperatorAccess


class Bench:
    """Operator access to stand-ins for the parts of a master."""

    def __init__(self, path: Path | None, *, directory: Path | None = None, policy: Any = None) -> None:
        self.state = SimpleNamespace(store_error=None)
        synchronizer = SimpleNamespace(state=self.state, catalogue=SimpleNamespace())
        self.access = OperatorAccess(
            cast(Any, SimpleNamespace(control_path=lambda: path, snapshot_dir=directory)), cast(Any, synchronizer),
            cast(Any, SimpleNamespace(sync_soon=None, sync_now=None)), cast(Any, None), cast(Any, None),
            policy=policy, signer=lambda: None, status=cast(Any, None), held_commands=lambda: (),
        )  # fmt: skip


async def test_without_a_path_there_is_no_control_socket_and_closing_does_nothing() -> None:
    bench = Bench(None)
    assert not bench.access.offered
    assert bench.access.state == "off"
    await bench.access.close()


async def test_a_control_socket_is_offered_if_it_has_a_path(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "control.sock")
    assert bench.access.offered
    assert bench.access.state != "off"
    await bench.access.close()


def test_notices_name_files_that_are_not_stored_and_an_unusable_policy(tmp_path: Path) -> None:
    assert Bench(None, directory=tmp_path).access._notices() == []
    (nothing,) = Bench(None).access._notices()
    assert nothing.startswith("nothing is stored, because SNAPSHOT_DIR is not set: ")
    full = Bench(None, directory=tmp_path)
    full.state.store_error = "No space left on device"
    assert full.access._notices() == ["the last-known-good snapshot is not stored: No space left on device"]


@pytest.mark.parametrize("problem", [None, "line 3: unknown key"])
def test_a_notice_names_the_policy_only_if_it_has_a_problem(tmp_path: Path, problem: str | None) -> None:
    notices = Bench(None, directory=tmp_path, policy=SimpleNamespace(problem=problem)).access._notices()
    assert notices == (
        [] if problem is None
        else ["PUBLICATION_POLICY is not usable; the previous policy applies: line 3: unknown key"]
    )  # fmt: skip
