"""Faults that the tests must notice in every run: a few of each room, with effects that appear late.

Each fault consists of a piece of a module, its replacement, and the test that must then fail. If a piece is no longer
in its module, replace it here by a piece with the same meaning.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.mutants.__main__ import ROOT, Runner
from tests.mutants.rooms import ROOMS

ENGINE = "tests/unit/grpc_h2"
SERVER = "tests/unit/definition_server"
CANCEL = "            self._timer.cancel()"
FAULTS = (
    # Clean-up that is deleted.
    ("grpc_h2/aio/server.py", "self._loop.call_later(_FIRST_CALL, protocol.drain)", "pass",
     f"{ENGINE}/aio/test_listener.py::test_a_connection_that_arrives_during_a_stop_is_drained"),
    ("grpc_h2/aio/call.py", CANCEL, "            pass",
     f"{ENGINE}/aio/test_release.py::test_a_call_that_has_ended_before_its_deadline_is_released"),
    ("grpc_h2/aio/protocol.py", CANCEL, "            pass",
     f"{ENGINE}/aio/test_release.py::test_a_connection_that_has_ended_is_released"),
    ("definition_server/control_plane/delayed_release.py", f"{CANCEL}\n            self._timer = None",
     "            self._timer = None",
     f"{SERVER}/control_plane/test_delayed_release.py::"
     "test_a_snapshot_is_held_for_its_full_time_even_if_an_earlier_one_was_due"),
    ("definition_server/control_plane/delayed_release.py", f"{CANCEL}\n        self._held = []",
     "            pass\n        self._held = []",
     f"{SERVER}/control_plane/test_delayed_release.py::test_close_cancels_the_release_that_was_due"),
    ("definition_server/control_plane/master.py", "        forever[0].cancel()", "        pass",
     "tests/integration/test_start.py::test_the_table_is_not_read_during_a_drain"),
    # Accounts that do not balance.
    ("grpc_h2/connection/stream.py", "self.unread -= cost", "self.unread += cost",
     f"{ENGINE}/connection/test_accounts.py::test_messages_that_a_handler_takes_leave_nothing_unread"),
    ("grpc_h2/connection/bodies.py", "self.unread -= unread", "pass",
     f"{ENGINE}/connection/test_accounts.py::test_a_call_that_ends_leaves_none_of_its_messages_unread"),
    ("definition_server/ipc/stats.py", "+= number * elapsed_ns", "+= elapsed_ns",
     f"{SERVER}/ipc/test_stats.py::test_count_many_equals_as_many_single_counts"),
    # Best-effort work that does nothing.
    ("definition_server/data_plane/transports/first_calls.py", "if presented else", "if not key else",
     f"{SERVER}/data_plane/test_warmup.py::test_warm_up_makes_every_kind_of_first_call_once"),
    # Checks that let everything pass.
    ("definition_server/ipc/memory.py", "if seals & SEALS != SEALS:", "if not seals:",
     f"{SERVER}/ipc/test_memory.py::test_memory_that_lacks_any_seal_is_not_mapped"),
    ("definition_server/catalog/snapshot.py", "if hashlib.sha256(", "if False and hashlib.sha256(",
     f"{SERVER}/catalog/test_snapshot.py::test_every_single_flipped_bit_is_refused_by_a_named_check"),
)  # fmt: skip


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("listed") / "tree")
    yield runner
    runner.close()


@pytest.mark.parametrize(
    ("module", "piece", "fault", "test"), FAULTS, ids=[test.rpartition("::")[2] for *_, test in FAULTS]
)
def test_a_listed_fault_is_noticed_by_its_test(runner: Runner, module: str, piece: str, fault: str, test: str) -> None:
    source = (ROOT / "service" / module).read_text("utf-8")
    assert source.count(piece) == 1, "the list is out of date"
    with runner.changed(f"service/{module}", source.replace(piece, fault)):
        outcomes = runner.pytest([test])
    assert outcomes is not None
    assert outcomes, "there is no such test"
    assert "failed" in {outcome[0] for outcome in outcomes.values()}


def test_the_tests_of_the_list_pass_without_a_fault(runner: Runner) -> None:
    outcomes = runner.pytest([test for *_, test in FAULTS])
    assert outcomes is not None
    assert {outcome[0] for outcome in outcomes.values()} <= {"passed", "skipped"}


def test_every_room_has_a_listed_fault() -> None:
    for room in ROOMS:
        assert any(module.startswith(room.folders) for module, *_ in FAULTS), room.name
