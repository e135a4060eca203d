"""A log line is one JSON object with ``ts``, ``level``, ``msg`` and ``pid`` first, for every logger and all values. An
exception in production is logged with type, text and place, without a traceback or any variable's value; in development
with the traceback, but without variables.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from definition_server.observability.logs import configure_logs, get_logger

LEVELS = ("DEBUG", "INFO", "WARN", "ERROR", "FATAL")

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, structured = logging.getLogger(), structlog.get_config()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.captureWarnings(False)
    root.handlers[:], logging.raiseExceptions = handlers, raising
    root.setLevel(level)
    structlog.configure(**structured)


def configured(app_env: str, level: str) -> io.StringIO:
    """Set up logging. Returns the text that is then written to stdout."""
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        configure_logs(app_env, level)
    return stdout


def parsed(stdout: io.StringIO) -> list[dict[str, Any]]:
    text = stdout.getvalue()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=_no_json) for line in text.split("\n")[:-1]]


def _no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture
def production() -> Lines:
    """Logging as in production; returns the lines so far, parsed."""
    stdout = configured("production", "DEBUG")
    return lambda: parsed(stdout)


def fail() -> None:
    """Raise where a local variable is a secret."""
    api_key = "hunter2"
    assert api_key
    raise ValueError("it broke")


# -- the line ----------------------------------------------------------------------------------------------------------


def test_a_line_has_the_contracts_fields_first_and_then_the_events(production: Lines) -> None:
    get_logger("x").info("Definitions Broadcasted", count=30, duration_ms=1.5, generation=2, version_hash="ab")
    (line,) = production()
    assert list(line) == ["ts", "level", "msg", "pid", "count", "duration_ms", "generation", "version_hash"]
    assert (line["level"], line["msg"], line["pid"]) == ("INFO", "Definitions Broadcasted", os.getpid())
    assert (line["count"], line["duration_ms"], line["version_hash"]) == (30, 1.5, "ab")


def test_the_time_is_iso_8601_in_utc(production: Lines) -> None:
    get_logger("x").info("now")
    (line,) = production()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", line["ts"])
    assert abs(datetime.fromisoformat(line["ts"]) - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("method", "level"),
    [
        ("debug", "DEBUG"),
        ("info", "INFO"),
        ("warning", "WARN"),
        ("error", "ERROR"),
        ("exception", "ERROR"),
        ("critical", "FATAL"),
        ("fatal", "FATAL"),
    ],
)
def test_levels_have_the_contracts_names_for_every_logger(production: Lines, method: str, level: str) -> None:
    getattr(get_logger("x"), method)("ours")
    getattr(logging.getLogger("some.library"), method)("theirs")
    assert [(line["msg"], line["level"]) for line in production()] == [("ours", level), ("theirs", level)]


@pytest.mark.parametrize("least", LEVELS)
@pytest.mark.parametrize("app_env", ["production", "development"])
def test_lines_below_the_level_are_not_logged_by_any_logger(app_env: str, least: str) -> None:
    stdout = configured(app_env, least)
    for logger in (get_logger("x"), logging.getLogger("some.library")):
        for method in ("debug", "info", "warning", "error", "critical"):
            getattr(logger, method)(f"<{method}>")
    expected = ["<debug>", "<info>", "<warning>", "<error>", "<critical>"][LEVELS.index(least) :]
    assert re.findall("<[a-z]+>", stdout.getvalue()) == expected * 2


def test_a_librarys_record_has_the_same_format(production: Lines) -> None:
    logging.getLogger("a.library").warning("lost %d of %s", 3, "four")
    (line,) = production()
    assert list(line) == ["ts", "level", "msg", "pid"]
    assert (line["level"], line["msg"], line["pid"]) == ("WARN", "lost 3 of four", os.getpid())


def test_configuring_twice_does_not_double_the_lines() -> None:
    """A worker configures its logs before and after it has its settings."""
    before = configured("production", "INFO")
    stdout = configured("production", "INFO")
    get_logger("x").info("once")
    logging.getLogger("y").info("once")
    assert (len(parsed(before)), len(parsed(stdout))) == (0, 2)


def test_a_logger_made_before_configuring_follows_it() -> None:
    """Modules create their loggers when they are imported."""
    logger = get_logger("x")
    stdout = configured("production", "WARN")
    logger.info("hidden")
    logger.warning("shown")
    assert [line["msg"] for line in parsed(stdout)] == ["shown"]
    stdout = configured("production", "DEBUG")
    logger.debug("shown again")
    assert [line["msg"] for line in parsed(stdout)] == ["shown again"]


# -- values that cannot be rendered ------------------------------------------------------------------------------------


class Plain:
    def __str__(self) -> str:
        return "<plain>"


def test_a_value_without_a_json_form_is_logged_as_text(production: Lines) -> None:
    get_logger("x").info("values", path=Path("/a"), raw=b"\xff", made=Plain(), several={1}, inner=[Plain()])
    (line,) = production()
    assert (line["path"], line["raw"], line["made"], line["several"]) == ("/a", "b'\\xff'", "<plain>", "{1}")
    assert line["inner"] == ["<plain>"]


CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


VALUES = {
    "tuple key": {(1, 2): "key"},
    "bytes key": {b"key": 1},
    "circle": CIRCLE,
    "no text": Broken(),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_value_whose_methods_raise_does_not_lose_its_line(production: Lines, value: object) -> None:
    get_logger("x").error("told", value=value)
    assert [line["msg"] for line in production()] == ["told"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_leave_the_line_valid_json(production: Lines, value: float) -> None:
    get_logger("x").info("told", value=value, other="kept", count=3)
    (line,) = production()
    assert list(line) == ["ts", "level", "msg", "pid", "value", "other", "count"]
    assert (line["msg"], line["other"], line["count"], line["pid"]) == ("told", "kept", 3, os.getpid())


@pytest.mark.parametrize("text", ["two\nlines", "\r\n", "\u2028", 'quote" back\\', "\x00\x1b[31m", "ñ日🐍", "\udcff"])
def test_any_text_stays_within_its_line(production: Lines, text: str) -> None:
    get_logger("x").info(text, value=text)
    logging.getLogger("y").info(text)
    lines = production()
    assert [line["msg"] for line in lines] == [text, text]
    assert lines[0]["value"] == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.text(), st.dictionaries(st.sampled_from(["count", "error", "name", "x"]), JSON))
def test_any_event_is_one_line_with_its_message(msg: str, fields: dict[str, Any]) -> None:
    stdout = configured("production", "INFO")
    get_logger("x").info(msg, **fields)
    (line,) = parsed(stdout)
    assert line["msg"] == msg
    assert {key: line[key] for key in list(line)[4:]} == fields


@pytest.mark.parametrize("field", ["ts", "level", "pid", "msg"])
def test_a_field_of_an_event_cannot_replace_a_field_of_the_contract(production: Lines, field: str) -> None:
    get_logger("x").info("the message", **{field: "nonsense"})
    (line,) = production()
    assert (line["level"], line["msg"], line["pid"]) == ("INFO", "the message", os.getpid())
    assert line["ts"].endswith("Z")


# -- exceptions --------------------------------------------------------------------------------------------------------


def place() -> str:
    """Where `fail` raises, as ``file:line``."""
    return f"{__file__}:{fail.__code__.co_firstlineno + 4}"


@pytest.mark.parametrize("how", ["exception", "exc_info=True", "exc_info=error", "stdlib", "stdlib exc_info"])
def test_an_exception_in_production_logs_type_text_and_place_without_a_traceback(production: Lines, how: str) -> None:
    try:
        fail()
    except ValueError as error:
        if how == "exception":
            get_logger("x").exception("Failed", worker=1)
        elif how == "exc_info=True":
            get_logger("x").error("Failed", exc_info=True, worker=1)
        elif how == "exc_info=error":
            get_logger("x").error("Failed", exc_info=error, worker=1)
        elif how == "stdlib":
            logging.getLogger("y").exception("Failed")
        else:
            logging.getLogger("y").error("Failed", exc_info=error)
    (line,) = production()
    assert (line["level"], line["msg"]) == ("ERROR", "Failed")
    assert (line["error"], line["at"]) == ("ValueError: it broke", place())
    assert line.keys() - {"worker"} == {"ts", "level", "msg", "pid", "error", "at"}
    assert "Traceback" not in str(line)
    assert "hunter2" not in str(line)


def test_the_place_of_an_exception_is_the_line_that_raised_it(production: Lines) -> None:
    try:
        json.loads("{")
    except ValueError:
        get_logger("x").exception("Failed")
    (line,) = production()
    assert re.fullmatch(r".*/json/decoder\.py:\d+", line["at"])


def test_an_exception_that_was_never_raised_has_no_place(production: Lines) -> None:
    get_logger("x").error("Failed", exc_info=ValueError("it broke"))
    (line,) = production()
    assert line["error"] == "ValueError: it broke"
    assert "at" not in line


def test_exc_info_without_an_exception_is_ignored(production: Lines) -> None:
    get_logger("x").error("Failed", exc_info=True)
    logging.getLogger("y").error("Failed", exc_info=True)
    assert all(line.keys() == {"ts", "level", "msg", "pid"} for line in production())


def test_stack_info_is_not_logged_in_production(production: Lines) -> None:
    get_logger("x").info("here", stack_info=True)
    logging.getLogger("y").info("here", stack_info=True)
    assert all(line.keys() == {"ts", "level", "msg", "pid"} for line in production())


@pytest.mark.parametrize("make", [get_logger, logging.getLogger])
def test_an_exception_in_development_has_a_traceback_but_no_variables(make: Callable[[str], Any]) -> None:
    stdout = configured("development", "INFO")
    try:
        fail()
    except ValueError:
        make("x").exception("Failed")
    text = stdout.getvalue()
    assert "Traceback (most recent call last)" in text
    assert "ValueError: it broke" in text
    assert "in fail" in text
    assert "Failed" in text
    shown = text.replace('api_key = "hunter2"', "")  # a line of source, not a value
    assert "hunter2" not in shown


def test_development_lines_are_readable_and_carry_the_fields() -> None:
    stdout = configured("development", "INFO")
    get_logger("x").info("Serving", workers=2)
    (line,) = stdout.getvalue().splitlines()
    assert "Serving" in line
    assert "workers=2" in line
    assert "\x1b" not in line  # no terminal, no colours


def test_a_development_line_about_a_publication_fits_two_lines_of_a_terminal() -> None:
    stdout = configured("development", "INFO")
    get_logger("x").info(
        "Definitions Broadcasted",
        added=189,
        bytes=127563,
        changed=0,
        count=189,
        duration_ms=593.0,
        generation=1,
        removed=0,
        version_hash="bac6a205" * 8,
    )
    (line,) = stdout.getvalue().splitlines()
    assert len(line) <= 2 * 80
    assert "version_hash=bac6a205bac6" in line
    assert "added=189" in line
    assert "removed" not in line


def test_development_lines_escape_control_characters_of_values_and_exceptions() -> None:
    stdout = configured("development", "INFO")
    get_logger("x").error("Sync failed", error="no \x1b]0;owned\x07 table", names=["\x1b[2J"])
    try:
        raise ValueError("bad \x1b[2J row")
    except ValueError:
        logging.getLogger("some.library").exception("Failed \x1b[2J")
    text = stdout.getvalue()
    assert "\x1b" not in text
    assert r"no \x1b]0;owned\x07 table" in text
    assert r"bad \x1b[2J row" in text


# -- a reader that went away -------------------------------------------------------------------------------------------

LOGGING = """
import sys
from definition_server.observability.logs import configure_logs, get_logger
configure_logs("production", "INFO")
sys.stdin.readline()
for _ in range(3):
    get_logger("x").info("nobody hears this")
sys.stderr.write("still here")
sys.stderr.flush()
import os
os._exit(0)
"""


def test_a_closed_stdout_neither_ends_the_process_nor_fills_stderr() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", LOGGING], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b"still here"
        assert process.wait(60) == 0


def test_a_worker_does_not_import_rich_even_if_it_is_installed() -> None:
    program = (
        "import sys, importlib.util, definition_server.data_plane.worker\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'rich']\n"
        "assert importlib.util.find_spec('rich'), 'the commands find it'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# -- errors that Python would print ------------------------------------------------------------------------------------

FAILURES = {
    "Unhandled exception; the process ends": "raise ValueError('it broke')",
    "Unhandled exception in a thread": "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",
    "Exception that could not be raised": "type('X', (), {'__del__': lambda self: 1 / 0})()",
    "<string>:5: UserWarning: beware": "warnings.simplefilter('always'); warnings.warn('beware')",
}


@pytest.mark.parametrize("message", FAILURES)
def test_errors_that_python_would_print_on_stderr_are_log_lines_on_stdout(message: str) -> None:
    program = (
        "import threading, warnings\n"
        "from definition_server.observability.logs import configure_logs\n"
        "configure_logs('production', 'INFO')\n"
        "\n"
        f"{FAILURES[message]}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, text=True)
    assert done.stderr == ""
    (line,) = [json.loads(each) for each in done.stdout.splitlines()]
    assert line["msg"].startswith(message)
    assert done.returncode == (1 if "the process ends" in message else 0)


def test_a_crash_in_native_code_still_reaches_stderr() -> None:
    program = (
        "import faulthandler, os\n"
        "from definition_server.observability.logs import configure_logs, get_logger\n"
        "configure_logs('production', 'INFO')\n"
        "faulthandler.enable()\n"
        "get_logger('x').critical('Last words')\n"
        "os.abort()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, text=True)
    assert "Fatal Python error: Aborted" in done.stderr
    assert '"Last words"' in done.stdout
