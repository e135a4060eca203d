"""Exit codes of the commands, and the output that they have in common."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path

import click

from definition_server.environment import EX_CONFIG, AnySettings, Check, Problem, SettingsError, load_settings, notices
from definition_server.observability.visible import visible as visible  # all commands print through this module
from definition_server.settings import Settings


class Exit(IntEnum):
    """Exit codes (documented in ``docs/cli.md``)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAUTHENTICATED = 4
    UNAVAILABLE = 69
    CONFIG = EX_CONFIG
    INTERRUPTED = 130
    """The exit code after Ctrl-C: 128 + SIGINT, by the usual convention."""


class CommandFailed(click.ClickException):
    """Ends a command with ``message`` on stderr and the exit code ``code``."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.exit_code = int(code)  # type: ignore[misc]  # click calls it a ClassVar, and reads it off the instance

    def format_message(self) -> str:
        """The message for stderr. It may contain text of a peer or a database. At a terminal it is wrapped at words."""
        return _at_a_terminal(visible(self.message, keep="\n\t"))


def _at_a_terminal(message: str) -> str:
    """``message`` of an error, wrapped at words if stderr is a terminal."""
    if not sys.stderr.isatty():
        return message
    return "\n".join(_wrapped(line) for line in message.split("\n"))


def _wrapped(line: str) -> str:
    """One line of an error at most as wide as the terminal, with ``Error: `` before it. Long words stay whole."""
    indent = line[: len(line) - len(line.lstrip())]
    columns = max(20, shutil.get_terminal_size().columns - len("Error: "))
    return textwrap.fill(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def settings_or_exit(
    cls: type[AnySettings],
    *,
    defaults: Mapping[str, str] | None = None,
    checks: Mapping[str, Check] | None = None,
    **overrides: str | None,
) -> AnySettings:
    """Like `load_settings`, but an invalid environment ends the command with a list of problems and exit code 78."""
    try:
        return load_settings(cls, defaults=defaults, checks=checks, **overrides)
    except SettingsError as error:
        raise unusable_environment([*error.problems, *misspelled(cls)]) from None


def misspelled(cls: type[AnySettings]) -> list[str]:
    """A sentence for each variable of the environment whose name is nearly that of a setting of ``cls``."""
    return [f"{notice.variable}: {notice.text}" for notice in notices(cls)]


def server_settings_or_exit(**overrides: str | None) -> Settings:
    """`settings_or_exit` for the server's settings. ``DATABASE_URL`` is checked with libpq."""
    from definition_server.control_plane.postgres import url_fault  # the client commands need no psycopg

    return settings_or_exit(Settings, defaults=None, checks={"DATABASE_URL": url_fault}, **overrides)


def unusable_environment(problems: Iterable[Problem | str]) -> CommandFailed:
    """The error that lists all ``problems``."""
    lines = [f"  {problem}" for problem in problems]
    return CommandFailed("\n".join(["the environment cannot be used:", *lines]), Exit.CONFIG)


@contextmanager
def readable_errors() -> Iterator[None]:
    """A context for the whole command line: wraps usage errors at a terminal, and reports refused output in one line.

    Ctrl-C ends with `Exit.INTERRUPTED`. If a full disk or a broken device refuses output, the code is `Exit.FAILED`. If
    the reader has closed the pipe, click exits silently.
    """
    try:
        yield
    except click.UsageError as error:
        raise click.UsageError(_at_a_terminal(error.format_message()), error.ctx) from None
    except KeyboardInterrupt:
        raise click.exceptions.Exit(Exit.INTERRUPTED) from None
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT_REFUSED:
            raise
        _drop_output()
        raise CommandFailed(f"cannot write the output: {error.strerror}", Exit.FAILED) from None


_OUTPUT_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def no_traceback() -> Iterator[None]:
    """A context for one command: if it ends early for a reason that is not a bug, the reason is printed in one line.

    Ctrl-C ends the command with `Exit.INTERRUPTED`, and output that cannot be written ends it with `Exit.FAILED`. If
    the reader has closed the pipe, click exits silently.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise click.exceptions.Exit(Exit.INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except UnicodeEncodeError as error:
        text = f"the output cannot be written in the encoding {error.encoding}; set PYTHONIOENCODING=utf-8"
        raise CommandFailed(text, Exit.FAILED) from None
    except OSError as error:
        where = "the output" if error.filename is None else error.filename
        if error.filename is None:
            _drop_output()
        raise CommandFailed(f"cannot write {where}: {error.strerror}", Exit.FAILED) from None


def _drop_output() -> None:
    """Discard the buffered output of stdout: writing it at exit would fail again, with Python's own exit code 120."""
    with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def on_terminal() -> bool:
    """Whether stdout is a terminal. A pipe gets neither colours nor tables, even with FORCE_COLOR."""
    return sys.stdout.isatty()


def print_json(value: object) -> None:
    """Print ``value`` as JSON on stdout, in ASCII, which every encoding can represent."""
    click.echo(json.dumps(value, indent=2))


def print_code(octets: bytes) -> None:
    """Print only ``octets``. On a terminal, control characters are escaped."""
    if on_terminal():
        click.echo(visible(octets.decode(errors="backslashreplace"), keep="\n\t"), nl=False)
    else:
        click.echo(octets, nl=False)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print one ``label: value`` per line on stdout, with aligned values."""
    width = max(len(label) for label, _ in facts) + 1
    for label, value in facts:
        click.echo(f"{label + ':':<{width}} {value}")


def print_wrapped_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Like `print_facts`, but at a terminal long values are wrapped between words."""
    if not on_terminal():
        print_facts(facts)
        return
    width = max(len(label) for label, _ in facts) + 2
    columns = max(width + 20, shutil.get_terminal_size().columns)
    for label, value in facts:
        click.echo(
            textwrap.fill(
                value or "-",
                columns,
                initial_indent=f"{label + ':':<{width}}",
                subsequent_indent=" " * width,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )


def print_wrapped(text: str) -> None:
    """Print lines of prose; at a terminal, wrapped between words."""
    columns = shutil.get_terminal_size().columns
    for line in text.split("\n"):
        wide = on_terminal() and len(line) > columns
        click.echo(textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False) if wide else line)
