"""An error on stderr never carries a control character of the text that it quotes."""

from __future__ import annotations

import pytest

from definition_server.cli.exits import CommandFailed, Exit


@pytest.mark.parametrize("foreign", ["\x1b[2J", "\x9b", "\x07", "\r", "\x7f", "‮"], ids=ascii)
def test_a_failed_commands_message_shows_control_characters_escaped(foreign: str) -> None:
    shown = CommandFailed(f"the database cannot be read: one{foreign}\n\ttwo", Exit.UNAVAILABLE).format_message()
    assert foreign not in shown
    assert shown.endswith("\n\ttwo")
    assert shown.isprintable() or shown.replace("\n\t", "").isprintable()
