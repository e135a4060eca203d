"""``JAIL`` in the master, on kernels that have both mechanisms, one, or none."""

from __future__ import annotations

from typing import Any

import pytest

from definition_server.control_plane import confinement as module
from definition_server.control_plane.confinement import confine_master
from definition_server.jail.confinement import Extent, Support, extent_of

BOTH, NO_LANDLOCK, NO_SECCOMP, NOTHING = Support(7, True), Support(0, True), Support(5, False), Support(0, False)


class Log:
    """Records the log lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def warning(self, message: str, **fields: Any) -> None:
        self.lines.append(("warning", message, fields))

    def critical(self, message: str, **fields: Any) -> None:
        self.lines.append(("critical", message, fields))


class Kernel:
    """A kernel with the mechanisms that the test sets."""

    def __init__(self) -> None:
        self.offers = BOTH
        self.hidden = 0
        self.log = Log()

    def support(self) -> Support:
        return self.offers

    def hide_process(self) -> None:
        self.hidden += 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    for name in ("support", "hide_process", "log"):
        monkeypatch.setattr(module, name, getattr(made, name))
    return made


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_on_a_kernel_with_both_mechanisms_the_master_is_hidden_and_nothing_is_logged(kernel: Kernel, mode: str) -> None:
    assert confine_master(mode)
    assert (kernel.hidden, kernel.log.lines) == (1, [])


@pytest.mark.parametrize(
    ("offers", "warning"),
    [
        (NO_LANDLOCK, "Workers are confined only in part"),
        (NO_SECCOMP, "Workers are confined only in part"),
        (NOTHING, "Workers are not confined"),
    ],
    ids=["seccomp", "landlock", "none"],
)
def test_auto_warns_once_and_starts_and_require_does_not_start(kernel: Kernel, offers: Support, warning: str) -> None:
    kernel.offers = offers
    assert confine_master("auto")
    ((level, message, fields),) = kernel.log.lines
    assert (level, fields["missing"], fields["jail"]) == ("warning", offers.missing, offers.extent)
    assert message == warning
    kernel.log.lines.clear()
    assert not confine_master("require")
    ((level, message, fields),) = kernel.log.lines
    assert (level, message) == ("critical", "Cannot start")
    assert offers.missing in fields["error"]
    assert "JAIL" in fields["remedy"]


def test_off_leaves_the_master_readable_for_debuggers(kernel: Kernel) -> None:
    kernel.offers = NOTHING
    assert confine_master("off")
    assert (kernel.hidden, kernel.log.lines) == (0, [])


@pytest.mark.parametrize("text", ["", "FULL", "full ", "\x1b[2J", "x" * 4000])
def test_an_unknown_extent_of_confinement_is_treated_as_none(text: str) -> None:
    assert extent_of(text) is Extent.NONE
    assert extent_of("full") is Extent.FULL
