"""A swap: its steps have a fixed order, and only the commit changes the served snapshot."""

from __future__ import annotations

import pytest
from tests.support.snapshots import opened

from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.swap import Swap, SwapState


async def test_only_the_commit_changes_the_served_snapshot() -> None:
    engine, old, new = DefinitionEngine(), opened("if"), opened("else")
    assert Swap(engine, old).commit() is None
    swap = Swap(engine, new)
    await swap.prepare()
    assert engine.snapshot is old
    assert swap.commit() is old
    assert engine.snapshot is new
    await swap.release()
    assert engine.snapshot is new
    assert swap.state is SwapState.RELEASED


async def test_a_step_out_of_order_is_a_bug() -> None:
    engine = DefinitionEngine()
    swap = Swap(engine, opened("if"))
    with pytest.raises(AssertionError):
        await swap.release()
    swap.commit()
    with pytest.raises(AssertionError):
        swap.commit()
    with pytest.raises(AssertionError):
        await swap.prepare()
    await swap.release()
    with pytest.raises(AssertionError):
        await swap.release()
