"""Renders the declaration of the settings: for ``--help`` and for ``docs/settings.md``."""

from __future__ import annotations

from collections.abc import Mapping
from shutil import get_terminal_size
from textwrap import wrap
from types import MappingProxyType

from pydantic_settings import BaseSettings

from definition_server.cli.client_settings import ClientSettings, ControlSettings
from definition_server.environment import default_text, is_secret, remedy, variables
from definition_server.settings import Settings

_EPILOG_COLUMNS = 78
"""The most columns of a line; click adds an indentation of two."""
_LEAST_COLUMNS = 30


def settings_epilog(*classes: type[BaseSettings], defaults: Mapping[str, str | None] = MappingProxyType({})) -> str:
    """The environment variables of ``classes`` as the last part of a command's ``--help``.

    Args:
        classes: The settings that the command reads.
        defaults: The command's own defaults by variable; None leaves the variable out.
    """
    columns = max(_LEAST_COLUMNS, min(_EPILOG_COLUMNS, get_terminal_size().columns - 2))
    lines = ["\b", "Environment:"]
    for cls in classes:
        for field in cls.model_fields.values():
            default = defaults.get(variables(field)[0], default_text(field))
            if default is None:
                continue
            names = ", ".join(variables(field))
            file = f" (or {variables(field)[0]}_FILE)" if is_secret(field) else ""
            lines.append(f"  {names}{file}  [{default}]")
            lines += wrap(
                _plain(field.description),
                columns,
                initial_indent=" " * 6,
                subsequent_indent=" " * 6,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def settings_page() -> str:
    """``docs/settings.md``."""
    parts = [
        "# Settings",
        "",
        "<!-- Written by `definition-server config --reference`. Edit settings.py or cli/client_settings.py. -->",
        "",
        "All settings come from the environment. An invalid environment ends the command with exit code 78, and every",
        "problem is reported: the variable, its value (masked where it is secret), the reason and a remedy. A secret",
        "`X` may be in the file that `X_FILE` names instead. On `SIGHUP` the server reads these files again; a secret",
        "whose file cannot be used keeps its last good value. An empty variable counts as unset: if a base sets",
        "`X_FILE` and you want `X`, override `X_FILE` with an empty value.",
        "",
        "White space around a value is dropped, and choices may be in any case. Around a secret, from a variable or a",
        "file, line ends and a byte order mark are dropped (with a warning for a variable). Other white space at its",
        "ends is refused, because the other side may use it. Numbers have no units and no separators. At",
        "the start the server warns of variables whose names are similar to those of settings.",
        "",
        "## Server (`definition-server serve`)",
        "",
        *_table(Settings),
        "",
        "## Client commands (`get`, `fetch`, `health`, `export`)",
        "",
        *_table(ClientSettings),
        "",
        "## Operator's commands (`status`, `history`, `diff`, `accept`, `pin`, `unpin`, `sync`, `roll`, `export`)",
        "",
        *_table(ControlSettings),
        "",
    ]
    return "\n".join(parts)


def _table(cls: type[BaseSettings]) -> list[str]:
    rows = ["| variable | default | what it does | values |", "|---|---|---|---|"]
    for field in cls.model_fields.values():
        names = " or ".join(f"`{name}`" for name in variables(field))
        if is_secret(field):
            names += f" or `{variables(field)[0]}_FILE`"
        rows.append(f"| {names} | {default_text(field)} | {field.description} | {remedy(field)} |")
    return rows


def _plain(text: str | None) -> str:
    return (text or "").replace("`", "")
