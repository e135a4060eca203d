"""The warnings of a start: settings that are allowed, but are probably mistakes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.logs import LogLines, logged

from definition_server.control_plane import start_notices
from definition_server.control_plane.start_notices import NOT_STORED, log_notices

UNSIGNED = "Code is served unsigned: AVAP_INTERNAL_KEY is not set"
NOTHING_STORED = "Nothing is stored: SNAPSHOT_DIR is not set"


@pytest.mark.parametrize("lasting", [True, False], ids=["a server for others", "a demonstration"])
@pytest.mark.parametrize("key", [None, "key"], ids=["no key", "a key"])
@pytest.mark.parametrize("directory", [None, Path("/srv")], ids=["no directory", "a directory"])
def test_a_missing_key_or_directory_is_warned_of_if_other_machines_use_the_server(
    lasting: bool, key: str | None, directory: Path | None, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_notices, "notices", lambda _: [])
    log_notices(cast(Any, SimpleNamespace(avap_internal_key=key, snapshot_dir=directory)), lasting=lasting)
    assert len(logged(logs, UNSIGNED, log_level="warning")) == (lasting and key is None)
    stored = logged(logs, NOTHING_STORED, log_level="warning", effect=NOT_STORED)
    assert len(stored) == (lasting and directory is None)


def test_each_variable_that_may_be_a_mistake_is_named(logs: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [SimpleNamespace(variable="WORKER", text="it is not known; WORKERS is")]
    monkeypatch.setattr(start_notices, "notices", lambda _: found)
    log_notices(cast(Any, SimpleNamespace(avap_internal_key="key", snapshot_dir=Path("/srv"))), lasting=True)
    (line,) = logs
    assert line["event"] == "An environment variable may be wrong"
    assert (line["variable"], line["reason"]) == ("WORKER", "it is not known; WORKERS is")
