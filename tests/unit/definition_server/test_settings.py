"""The environment is read once, completely and strictly: all problems are reported at once with variable, masked value
and remedy. Old names and secret files are read too, by a fixed precedence. No secret is ever shown, and the reference
page matches the declaration.
"""

from __future__ import annotations

import os
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydantic
import pytest
from tests.support.certificates import Authority

from definition_server.api_keys import LONGEST_KEY
from definition_server.cli.reference import settings_epilog, settings_page
from definition_server.cpus import granted_cpus
from definition_server.environment import (
    Problem,
    SettingsError,
    default_text,
    effective,
    inherited_environment,
    is_secret,
    load_settings,
    notices,
    remedy,
    variables,
)
from definition_server.settings import ClientSettings, Settings

REQUIRED = {"DATABASE_URL": "postgresql://reader:pw@db:5432/avap", "API_KEY": "key-of-clients"}

DECLARATIONS = (Settings, ClientSettings)
FIELDS = [(cls, name) for cls in DECLARATIONS for name in cls.model_fields]
SECRETS = ("DATABASE_URL", "API_KEY", "API_KEYS", "AVAP_INTERNAL_KEY")
SINGLE = ("DATABASE_URL", "API_KEY", "AVAP_INTERNAL_KEY")
"""Those that hold one value, and no list."""
SECONDS = {
    "SYNC_INTERVAL_SECONDS": "sync_interval_seconds",
    "MAX_CONNECTION_AGE_SECONDS": "max_connection_age_seconds",
    "CONNECT_TIMEOUT_SECONDS": "connect_timeout_seconds",
    "STATEMENT_TIMEOUT_SECONDS": "statement_timeout_seconds",
    "DRAIN_WAIT_SECONDS": "drain_wait_seconds",
    "HEARTBEAT_TIMEOUT_SECONDS": "heartbeat_timeout_seconds",
    "START_TIMEOUT_SECONDS": "start_timeout_seconds",
    "MAX_CONNECTION_IDLE_SECONDS": "max_connection_idle_seconds",
    "KEEPALIVE_TIME_SECONDS": "keepalive_time_seconds",
    "KEEPALIVE_TIMEOUT_SECONDS": "keepalive_timeout_seconds",
    "KEEPALIVE_MIN_TIME_SECONDS": "keepalive_min_time_seconds",
}
MAY_BE_ZERO = ("MAX_CONNECTION_IDLE_SECONDS", "MAX_CONNECTION_AGE_SECONDS", "DRAIN_WAIT_SECONDS")

MARK = "hunter2"
"""Part of every secret that a test looks for."""


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """An environment in which only ``values`` concern the settings."""
    known = {name for cls, field in FIELDS for name in variables(cls.model_fields[field])}
    with pytest.MonkeyPatch.context() as patch:
        for name in known | {f"{name}_FILE" for name in known}:
            patch.delenv(name, raising=False)
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def load(**values: str) -> Settings:
    """The settings from the required variables and ``values``."""
    with environment(**{**REQUIRED, **values}):
        return load_settings(Settings)


def failure(**values: str) -> SettingsError:
    """The error that refuses the settings from the required variables and ``values``."""
    with pytest.raises(SettingsError) as caught:
        load(**values)
    return caught.value


def secret_file(folder: Path, content: bytes) -> str:
    path = folder / "secret"
    path.write_bytes(content)
    return str(path)


# -- required variables, and the report of an invalid environment ------------------------------------------------------


def test_the_required_variables_suffice() -> None:
    settings = load()
    assert settings.database_url.get_secret_value() == REQUIRED["DATABASE_URL"]
    assert settings.keys_by_id() == {"default": REQUIRED["API_KEY"]}
    assert settings.avap_internal_key is None
    assert (settings.port, settings.metrics_port, settings.sync_interval_seconds) == (50051, 9464, 60.0)
    assert (settings.app_env, settings.log_level, settings.snapshot_dir) == ("production", "INFO", None)
    assert settings.workers == granted_cpus()


def test_both_missing_required_variables_are_reported_at_once() -> None:
    with environment(), pytest.raises(SettingsError) as caught:
        load_settings(Settings)
    assert [(problem.variable, problem.value, problem.reason) for problem in caught.value.problems] == [
        ("DATABASE_URL", None, "it is required"),
        ("API_KEY", None, "it is required"),
    ]
    assert "DATABASE_URL is not set: it is required. Set it to postgresql://" in str(caught.value)


def test_all_problems_are_reported_at_once_with_variable_value_and_remedy() -> None:
    error = failure(DATABASE_URL="mysql://u:hunter2@h/d", API_KEY="", PORT="x", WORKERS="0", NODE_ENV="staging")
    told = {problem.variable: problem for problem in error.problems}
    assert {name: problem.value for name, problem in told.items()} == {
        "DATABASE_URL": "********",
        "API_KEY": None,
        "PORT": "x",
        "WORKERS": "0",
        "NODE_ENV": "staging",  # by the name that was set
    }
    by_name = {variables(field)[0]: remedy(field) for field in Settings.model_fields.values()}
    for name, problem in told.items():
        assert problem.reason
        assert problem.remedy == by_name[{"NODE_ENV": "APP_ENV"}.get(name, name)]
    assert str(error).splitlines() == [str(problem) for problem in error.problems]


def test_a_problem_reads_as_one_sentence() -> None:
    assert str(Problem("PORT", "x", "no number", "Give one")) == "PORT = 'x': no number. Give one"
    assert str(Problem("PORT", None, "it is required", "Give one")) == "PORT is not set: it is required. Give one"


WRONG = [
    *((port, value) for port in ("PORT", "METRICS_PORT") for value in ("-1", "65536", "x", "1.5")),
    *((name, value) for name in SECONDS for value in ("-0.1", "x", "nan", "inf", "86400.1")),
    *((name, "0") for name in SECONDS if name not in MAY_BE_ZERO),
    *(("DRAIN_TIMEOUT_SECONDS", value) for value in ("0", "nan", "86401")),
    *(("MAX_CONNECTIONS", value) for value in ("-1", "1000001", "some")),
    *(("WORKERS", value) for value in ("0", "513", "2.5")),
    *((name, value) for name in ("THREADPOOL_SIZE", "UV_THREADPOOL_SIZE") for value in ("0", "1025", "many")),
    *((name, "maybe") for name in ("ALLOW_EMPTY_CATALOG", "REFLECTION")),
    *((name, "test") for name in ("APP_ENV", "NODE_ENV")),
    ("LOG_LEVEL", "WARNING"),
    ("TRANSPORT", "pigeon"),
    ("DATABASE_URL", "mysql://db/avap"),
    ("DATABASE_URL", "db:5432"),
    ("API_KEY", "clé"),
    ("API_KEY", " key"),
    ("API_KEY", "key "),
    ("API_KEY", "k\te\ty"),
]


@pytest.mark.parametrize(("variable", "value"), WRONG)
def test_an_invalid_value_is_refused_under_its_variable(variable: str, value: str) -> None:
    assert [problem.variable for problem in failure(**{variable: value}).problems] == [variable]


def test_the_limits_themselves_are_allowed() -> None:
    assert load(PORT="0", METRICS_PORT="65535", WORKERS="512", THREADPOOL_SIZE="1024").workers == 512
    assert load(MAX_CONNECTION_AGE_SECONDS="0", DRAIN_WAIT_SECONDS="0").drain_wait_seconds == 0
    assert load(SYNC_INTERVAL_SECONDS="86400").sync_interval_seconds == 86_400
    assert load(DATABASE_URL="postgres://db/avap").database_url.get_secret_value() == "postgres://db/avap"


@pytest.mark.parametrize(("variable", "name"), SECONDS.items())
def test_seconds_may_be_fractions(variable: str, name: str) -> None:
    assert getattr(load(**{variable: "0.25"}), name) == 0.25


@pytest.mark.parametrize(
    "values",
    [
        {"DRAIN_WAIT_SECONDS": "10", "DRAIN_TIMEOUT_SECONDS": "10"},
        {"DRAIN_WAIT_SECONDS": "10", "DRAIN_TIMEOUT_SECONDS": "9.9"},
        {"DRAIN_WAIT_SECONDS": "25"},  # against the default of the other
        {"DRAIN_TIMEOUT_SECONDS": "5"},
    ],
)
def test_the_drain_timeout_must_exceed_the_wait_even_where_one_is_a_default(values: dict[str, str]) -> None:
    (problem,) = failure(**values).problems
    assert problem.variable == "DRAIN_TIMEOUT_SECONDS"
    assert problem.value == values.get("DRAIN_TIMEOUT_SECONDS", "25")
    assert "DRAIN_WAIT_SECONDS" in problem.reason


def test_a_drain_timeout_just_above_the_wait_is_allowed() -> None:
    assert load(DRAIN_WAIT_SECONDS="24.9").drain_timeout_seconds == 25.0


# -- spelling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LOG_LEVEL", "info", "INFO"),
        ("LOG_LEVEL", " Warn ", "WARN"),
        ("APP_ENV", "Production", "production"),
        ("NODE_ENV", "DEVELOPMENT", "development"),
        ("TRANSPORT", "GRPCIO", "grpcio"),
        ("REFLECTION", "TRUE", True),
        ("REFLECTION", "On", True),
        ("ALLOW_EMPTY_CATALOG", "No", False),
        ("PORT", " 1 ", 1),
        ("HOST", " ::1 ", "::1"),
        ("METRICS_HOST", " :: ", "::"),
        ("METRICS_HOST", "[::1]", "[::1]"),
        ("SYNC_INTERVAL_SECONDS", "1e1", 10.0),
        ("SYNC_INTERVAL_SECONDS", ".5", 0.5),
        ("WORKERS", "  ", None),
    ],
)
def test_case_and_white_space_around_a_value_do_not_matter(variable: str, value: str, expected: object) -> None:
    name = next(n for n, f in Settings.model_fields.items() if variable in variables(f))
    assert getattr(load(**{variable: value}), name) == (granted_cpus() if expected is None else expected)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("SYNC_INTERVAL_SECONDS", "60s", "unit"),
        ("SYNC_INTERVAL_SECONDS", "5 min", "unit"),
        ("WORKERS", "4CPU", "unit"),
        ("MAX_CONNECTIONS", "10_000", "without separators"),
        ("SYNC_INTERVAL_SECONDS", "1_0", "without separators"),
        ("SYNC_INTERVAL_SECONDS", "0,5", "without separators"),
        ("MAX_CONNECTIONS", "1,000", "without separators"),
        ("WORKERS", "2.0", "whole number"),
        ("WORKERS", "two", "not a number"),
        ("WORKERS", "\uff12", "not a number"),
        ("SYNC_INTERVAL_SECONDS", "inf", "not a number"),
        ("METRICS_PORT", "tcp://10.0.0.1:9464", "enableServiceLinks"),
        ("REFLECTION", "enabled", "neither true nor false"),
        ("METRICS_HOST", "localhost", "not an IP address"),
        ("LOG_LEVEL", "verbose", "'DEBUG', 'INFO'"),
        ("WORKERS", "1000", "less than or equal to 512"),
    ],
)
def test_a_likely_mistake_is_named(variable: str, value: str, reason: str) -> None:
    (problem,) = failure(**{variable: value}).problems
    assert (problem.variable, problem.value) == (variable, value)
    assert reason in problem.reason


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DATABASE_URI", "DATABASE_URL"),
        ("database_url", "DATABASE_URL"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("APIKEY", "API_KEY"),
        ("API_KEYS_FILES", "API_KEYS_FILE"),
        ("SYNC_INTERVAL", "SYNC_INTERVAL_SECONDS"),
        ("TLS_CERT", "TLS_CERT_FILE"),
        ("AVAP_INTERNALKEY", "AVAP_INTERNAL_KEY"),
        ("AVAP_PORT", "PORT"),
        ("METRICS-PORT", "METRICS_PORT"),
    ],
)
def test_a_name_that_is_nearly_a_setting_s_is_noticed(name: str, meant: str) -> None:
    with environment(**{key: value for key, value in REQUIRED.items() if key != meant}, **{name: MARK}):
        (notice,) = [each for each in notices(Settings) if each.variable == name]
    assert f"did you mean {meant}?" in notice.text
    assert MARK not in str(notice)


@pytest.mark.parametrize(
    "name", ["HOSTNAME", "PGHOST", "HOME", "DEFINITION_SERVER_PORT", "OPENAI_API_KEY", "KUBERNETES_PORT", "PORT_HTTP"]
)
def test_ordinary_variables_are_not_noticed(name: str) -> None:
    with environment(**REQUIRED, **{name: "x"}):
        assert name not in {notice.variable for notice in notices(Settings)}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DATABASE_POOL_SIZE", "add CPUs and WORKERS"),
        ("DB_POOL_SIZE", "add CPUs and WORKERS"),
        ("NODE_OPTIONS", "docs/runtime-flags.md"),
    ],
)
def test_a_variable_of_another_server_is_noticed_once_with_what_serves_its_purpose(name: str, said: str) -> None:
    with environment(**REQUIRED, **{name: MARK}):
        (notice,) = [each for each in notices(Settings) if each.variable == name]
        assert load_settings(Settings).workers, "it does not prevent a start"
    assert said in notice.text
    assert MARK not in str(notice)


def test_the_name_of_a_setting_that_is_set_is_not_suggested() -> None:
    with environment(**REQUIRED, DATABASE_URI="x"):
        assert notices(Settings) == []


def test_line_ends_that_were_dropped_from_a_variable_are_noticed_and_from_a_file_are_not(tmp_path: Path) -> None:
    with environment(**REQUIRED, AVAP_INTERNAL_KEY=f"{MARK}\n"):
        (notice,) = notices(Settings)
    assert notice.variable == "AVAP_INTERNAL_KEY"
    assert "line ends" in notice.text
    assert MARK not in str(notice)
    with environment(**REQUIRED, AVAP_INTERNAL_KEY_FILE=secret_file(tmp_path, b"key\n")):
        assert notices(Settings) == []


# -- keys by id --------------------------------------------------------------------------------------------------------


def test_keys_by_id_replace_or_join_the_single_key(tmp_path: Path) -> None:
    keys = secret_file(tmp_path, b"# the fleet\nold:one\n\nnew:two\n")
    assert load(API_KEY="", API_KEYS_FILE=keys).keys_by_id() == {"old": "one", "new": "two"}
    assert load(API_KEYS_FILE=keys).keys_by_id() == {"default": REQUIRED["API_KEY"], "old": "one", "new": "two"}
    assert load(API_KEY="", API_KEYS="a:k1\nb:k2").keys_by_id() == {"a": "k1", "b": "k2"}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (f"default:{MARK}", "the id default is that of API_KEY"),
        (f"a:{REQUIRED['API_KEY']}", "the key of API_KEY"),
        (f"a:{MARK}\nb", "line 2: there is no colon"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_without_showing_one(keys: str, reason: str) -> None:
    error = failure(API_KEYS=keys)
    (problem,) = error.problems
    assert (problem.variable, problem.value) == ("API_KEYS", "********")
    assert reason in problem.reason
    assert MARK not in str(error)


def test_an_unreadable_file_of_keys_is_one_problem(tmp_path: Path) -> None:
    (problem,) = failure(API_KEY="", API_KEYS_FILE=str(tmp_path / "missing")).problems
    assert problem.variable == "API_KEYS_FILE"


def test_a_key_longer_than_a_header_may_carry_is_refused() -> None:
    assert load(API_KEY="k" * LONGEST_KEY).keys_by_id()["default"] == "k" * LONGEST_KEY
    (problem,) = failure(API_KEY="k" * (LONGEST_KEY + 1)).problems
    assert "a header carries at most" in problem.reason


# -- names, precedence, defaults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"NODE_ENV": "development"}, "development"),
        ({"APP_ENV": "production", "NODE_ENV": "development"}, "production"),
        ({"APP_ENV": "development", "NODE_ENV": "nonsense"}, "development"),
        ({"APP_ENV": "", "NODE_ENV": "development"}, "development"),
        ({"APP_ENV": "", "NODE_ENV": ""}, "production"),
    ],
)
def test_the_old_name_of_app_env_is_read_where_the_new_one_is_unset(values: dict[str, str], expected: str) -> None:
    assert load(**values).app_env == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"UV_THREADPOOL_SIZE": "128"}, 128),
        ({"THREADPOOL_SIZE": "8", "UV_THREADPOOL_SIZE": "128"}, 8),
        ({"THREADPOOL_SIZE": "", "UV_THREADPOOL_SIZE": "128"}, 128),
    ],
)
def test_the_old_name_of_threadpool_size_is_read_where_the_new_one_is_unset(
    values: dict[str, str], expected: int
) -> None:
    assert load(**values).threadpool_size == expected


def test_an_empty_variable_counts_as_unset() -> None:
    optional = [variables(f) for f in Settings.model_fields.values() if default_text(f)[:8] != "required"]
    assert load(**{name: "" for names in optional for name in names}) == load()
    assert [problem.value for problem in failure(DATABASE_URL="", API_KEY="").problems] == [None, None]


def test_variables_in_other_letters_and_unknown_variables_are_ignored() -> None:
    assert load(port="1", database_url="x", DATABASE_URI="y") == load()


def test_an_override_takes_precedence_over_any_of_its_variables() -> None:
    with environment(**REQUIRED, PORT="1", NODE_ENV="production"):
        settings = load_settings(Settings, PORT="2", APP_ENV="development")
    assert (settings.port, settings.app_env) == (2, "development")


def test_any_of_its_variables_takes_precedence_over_a_default(tmp_path: Path) -> None:
    defaults = {"PORT": "2", "METRICS_PORT": "3", "APP_ENV": "development", "API_KEY": "default", "WORKERS": "1"}
    key = secret_file(tmp_path, b"from-file")
    with environment(DATABASE_URL="postgresql://h/d", PORT="1", NODE_ENV="production", API_KEY_FILE=key, WORKERS=""):
        settings = load_settings(Settings, defaults=defaults)
    assert (settings.port, settings.metrics_port, settings.app_env, settings.workers) == (1, 3, "production", 1)
    assert settings.keys_by_id() == {"default": "from-file"}


def test_an_invalid_override_is_reported_like_an_invalid_variable() -> None:
    with environment(**REQUIRED), pytest.raises(SettingsError) as caught:
        load_settings(Settings, PORT="x")
    assert [(problem.variable, problem.value) for problem in caught.value.problems] == [("PORT", "x")]


def test_settings_cannot_be_changed() -> None:
    settings = load()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


# -- secrets from files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", SINGLE)
@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b"\n\n"])
def test_a_secret_is_read_from_its_file_without_the_trailing_newlines(
    variable: str, ending: bytes, tmp_path: Path
) -> None:
    path = secret_file(tmp_path, b"postgresql://from-file" + ending)
    settings = load(**{variable: "", f"{variable}_FILE": path})
    assert getattr(settings, variable.lower()).get_secret_value() == "postgresql://from-file"


def test_white_space_within_a_secret_file_is_kept(tmp_path: Path) -> None:
    settings = load(AVAP_INTERNAL_KEY_FILE=secret_file(tmp_path, b"two\n lines\n"))
    assert settings.avap_internal_key is not None
    assert settings.avap_internal_key.get_secret_value() == "two\n lines"


@pytest.mark.parametrize("source", ["variable", "file"])
@pytest.mark.parametrize(
    ("around", "kept"),
    [
        ("{}\n", True),
        ("{}\r\n", True),
        ("\n{}", True),
        ("\ufeff{}", True),
        ("\ufeff{}\r\n", True),
        ("{} ", False),
        (" {}", False),
        ("{}\t\n", False),
        ("{}\xa0", False),
        ("\u200b{}", False),
    ],
)
@pytest.mark.parametrize("name", SINGLE)
def test_secrets_from_variables_and_files_are_cleaned_alike(
    name: str, around: str, kept: bool, source: str, tmp_path: Path
) -> None:
    """Line ends and a byte order mark are dropped. Other white space at the ends might be meant: it is refused."""
    text = around.format(f"postgresql://h/{MARK}")
    given = {name: text} if source == "variable" else {name: "", f"{name}_FILE": secret_file(tmp_path, text.encode())}
    if kept:
        assert getattr(load(**given), name.lower()).get_secret_value() == f"postgresql://h/{MARK}"
    else:
        (problem,) = failure(**given).problems
        assert (problem.variable, problem.value) == (name, "********")
        assert "white space" in problem.reason


@pytest.mark.parametrize(("content", "reason"), [(b"a\0b", "NUL"), ("key".encode("utf-16-le"), "NUL")])
def test_a_secret_with_a_nul_character_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (problem,) = failure(AVAP_INTERNAL_KEY_FILE=secret_file(tmp_path, content)).problems
    assert (problem.variable, problem.value) == ("AVAP_INTERNAL_KEY", "********")
    assert reason in problem.reason


def test_a_secret_file_that_cannot_be_read_twice_or_never_ends_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "cannot be read"),
    ):
        (problem,) = failure(API_KEY="", API_KEY_FILE=str(path)).problems
        assert problem.variable == "API_KEY_FILE"
        assert reason in problem.reason


def test_a_secret_file_of_more_than_a_mebibyte_is_refused(tmp_path: Path) -> None:
    (problem,) = failure(API_KEY="", API_KEY_FILE=secret_file(tmp_path, b"k" * (1024 * 1024 + 1))).problems
    assert "1 MiB" in problem.reason


@pytest.mark.parametrize("variable", SECRETS)
@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), (b"", "empty"), (b"\r\n \n", "empty"), (b"\xff\xfe", "not UTF-8")],
)
def test_an_unusable_secret_file_is_one_problem_that_names_it(
    variable: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "missing") if content is None else secret_file(tmp_path, content)
    (problem,) = failure(**{variable: "", f"{variable}_FILE": path}).problems
    assert (problem.variable, problem.value) == (f"{variable}_FILE", path)
    assert reason in problem.reason
    assert problem.remedy


@pytest.mark.parametrize("variable", SINGLE)
def test_a_secret_given_twice_is_refused(variable: str, tmp_path: Path) -> None:
    path = secret_file(tmp_path, b"postgresql://from-file")
    (problem,) = failure(**{variable: "postgresql://from-variable", f"{variable}_FILE": path}).problems
    assert problem.variable == f"{variable}_FILE"
    assert problem.remedy.startswith(f"Set only one of {variable} and {variable}_FILE")
    assert f"override it with {variable}_FILE=" in problem.remedy  # the way out where a base sets it


def test_a_file_that_a_base_names_is_overridden_by_an_empty_variable() -> None:
    assert load(API_KEY="mine", API_KEY_FILE="").keys_by_id() == {"default": "mine"}


def test_a_problem_of_a_secret_files_content_is_reported_masked(tmp_path: Path) -> None:
    (problem,) = failure(API_KEY="", API_KEY_FILE=secret_file(tmp_path, "clé".encode())).problems
    assert (problem.variable, problem.value) == ("API_KEY", "********")


def test_an_empty_file_name_counts_as_unset() -> None:
    assert load(API_KEY_FILE="") == load()


def test_only_secrets_come_from_files(tmp_path: Path) -> None:
    assert load(PORT_FILE=secret_file(tmp_path, b"1")) == load()
    assert {variables(field)[0] for field in Settings.model_fields.values() if is_secret(field)} == set(SECRETS)


# -- secrets stay secret -----------------------------------------------------------------------------------------------


def test_no_rendering_of_the_settings_shows_a_secret() -> None:
    values = {
        "DATABASE_URL": f"postgresql://u:{MARK}@h/d",
        "API_KEY": MARK,
        "AVAP_INTERNAL_KEY": MARK,
    }
    settings = load(**values)
    shown = effective(settings)
    assert {shown[name] for name in values} == {"********"}
    for text in (str(settings), repr(settings), str(shown), str(settings.model_dump()), settings.model_dump_json()):
        assert MARK not in text


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://u:{MARK}@h/d",
        MARK,
        f"Postgres://u:{MARK}@h/d",
        f"host=h password={MARK}",
        f"postgresql:/u:{MARK}@h/d",
        pytest.param(f"postgresql://u:{MARK}\xa0", id="a no-break space"),
    ],
)
def test_neither_a_refusal_nor_its_traceback_shows_a_secret(url: str) -> None:
    error = failure(DATABASE_URL=url, API_KEY=f" {MARK}")
    assert [problem.value for problem in error.problems] == ["********", "********"]
    for text in (str(error), repr(error.problems), "".join(traceback.format_exception(error))):
        assert MARK not in text


@pytest.mark.parametrize("url", ["Postgres://u:p@h/d", "POSTGRESQL://h/d"])
def test_a_scheme_in_capitals_is_refused_with_the_reason(url: str) -> None:
    (problem,) = failure(DATABASE_URL=url).problems
    assert "small letters" in problem.reason
    assert "percent-encode" in problem.remedy


def test_a_judge_from_outside_sees_a_sound_value_and_its_reason_is_reported() -> None:
    seen: list[str] = []

    def refuse(value: str) -> str:
        seen.append(value)
        return "it is too long"

    with environment(**REQUIRED), pytest.raises(SettingsError) as caught:
        load_settings(Settings, checks={"DATABASE_URL": refuse})
    (problem,) = caught.value.problems
    assert (problem.variable, problem.value, problem.reason) == ("DATABASE_URL", "********", "it is too long")
    with environment(**REQUIRED | {"DATABASE_URL": "x"}), pytest.raises(SettingsError):
        load_settings(Settings, checks={"DATABASE_URL": refuse})
    assert seen == [REQUIRED["DATABASE_URL"]]


def test_a_secret_that_is_not_text_is_refused() -> None:
    """The environment holds octets. Octets that are not UTF-8 could not be used as a key."""
    (problem,) = failure(AVAP_INTERNAL_KEY=os.fsdecode(b"\xff")).problems
    assert (problem.variable, problem.value) == ("AVAP_INTERNAL_KEY", "********")


def test_effective_lists_every_variable_in_the_order_of_the_declaration() -> None:
    shown = effective(load(SYNC_INTERVAL_SECONDS="0.5", REFLECTION="1", NODE_ENV="development", SNAPSHOT_DIR="/var/x"))
    assert list(shown) == [variables(field)[0] for field in Settings.model_fields.values()]
    assert shown["SYNC_INTERVAL_SECONDS"] == "0.5"
    assert shown["CONNECT_TIMEOUT_SECONDS"] == "5"
    assert (shown["REFLECTION"], shown["ALLOW_EMPTY_CATALOG"]) == ("true", "false")
    assert (shown["APP_ENV"], shown["SNAPSHOT_DIR"], shown["AVAP_INTERNAL_KEY"]) == ("development", "/var/x", None)


def test_a_child_inherits_only_named_variables() -> None:
    with environment(**REQUIRED), pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name not in REQUIRED:
                patch.delenv(name)
        for name in ("PATH", "PATHS", "LC_ALL", "XLC_ALL", "API_KEY_FILE"):
            patch.setenv(name, "x")
        inherited = inherited_environment(("PATH", "HOME"), ("LC_",))
    assert inherited == {"PATH": "x", "LC_ALL": "x"}


# -- the client's settings ---------------------------------------------------------------------------------------------


def test_client_settings_have_no_required_variable() -> None:
    with environment():
        settings = load_settings(ClientSettings)
    assert (settings.host, settings.port, settings.api_key) == ("127.0.0.1", 50051, None)


def test_clients_read_the_servers_port_and_key_and_a_host_of_their_own() -> None:
    with environment(HOST="0.0.0.0", PORT="1", API_KEY="k", DEFINITION_SERVER_HOST="far"):
        settings = load_settings(ClientSettings)
    assert (settings.host, settings.port) == ("far", 1)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "k"
    with environment(API_KEY="clé"), pytest.raises(SettingsError, match=r"API_KEY = '\*+': "):
        load_settings(ClientSettings)


# -- one declaration feeds the documentation ---------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_every_setting_has_a_description_and_a_remedy(cls: type[Settings] | type[ClientSettings], name: str) -> None:
    field = cls.model_fields[name]
    assert field.description is not None
    assert field.description.endswith(".")
    assert remedy(field)
    assert not remedy(field).endswith(".")  # a problem's sentence ends with it
    assert variables(field)[0].isupper()


def test_no_variable_sets_two_fields() -> None:
    for cls in DECLARATIONS:
        names = [name for field in cls.model_fields.values() for name in variables(field)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_help_and_reference_page_name_every_variable_and_what_it_does(
    cls: type[Settings] | type[ClientSettings], name: str
) -> None:
    field = cls.model_fields[name]
    page, epilog = settings_page(), " ".join(settings_epilog(cls).split())  # it is wrapped
    for variable in variables(field):
        assert f"`{variable}`" in page
        assert variable in epilog
    assert (f"{variables(field)[0]}_FILE" in epilog) == is_secret(field)
    assert str(field.description) in page
    assert str(field.description).replace("`", "") in epilog


def test_the_committed_reference_page_matches_the_declaration() -> None:
    path = Path(__file__).parents[3] / "docs/settings.md"
    assert path.exists(), "run `nox -s reference`"
    assert path.read_text(encoding="utf-8") == settings_page()


# -- TLS ---------------------------------------------------------------------------------------------------------------


def test_a_certificate_with_its_key_is_accepted(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    made = authority.sign("server")
    settings = load(TLS_CERT_FILE=str(made.cert), TLS_KEY_FILE=str(made.key), TLS_CLIENT_CA_FILE=str(authority.cert))
    assert (settings.tls_cert_file, settings.tls_key_file) == (made.cert, made.key)
    assert settings.tls_client_ca_file == authority.cert


def test_a_problem_of_tls_files_is_reported_under_the_variable_to_change(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    made, other = authority.sign("server"), authority.sign("other")
    cert, key, missing = str(made.cert), str(made.key), str(tmp_path / "missing")
    subprocess.run(
        ["openssl", "ec", "-in", key, "-aes128", "-passout", "pass:x", "-out", tmp_path / "locked"],
        check=True,
        capture_output=True,
    )
    pair = {"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}
    for variable, values, reason in (
        ("TLS_KEY_FILE", {"TLS_CERT_FILE": cert}, "belong together"),
        ("TLS_KEY_FILE", {"TLS_KEY_FILE": key}, "belong together"),
        ("TLS_KEY_FILE", {**pair, "TLS_KEY_FILE": str(other.key)}, "cannot be loaded"),
        ("TLS_KEY_FILE", {**pair, "TLS_KEY_FILE": missing}, "No such file"),
        ("TLS_KEY_FILE", {**pair, "TLS_CERT_FILE": missing}, "No such file"),
        ("TLS_KEY_FILE", {**pair, "TLS_CERT_FILE": key}, "cannot be loaded"),
        ("TLS_KEY_FILE", {**pair, "TLS_KEY_FILE": str(tmp_path / "locked")}, "the key is encrypted"),
        ("TLS_CLIENT_CA_FILE", {"TLS_CLIENT_CA_FILE": cert}, "needs TLS_CERT_FILE and TLS_KEY_FILE"),
        ("TLS_CLIENT_CA_FILE", {**pair, "TLS_CLIENT_CA_FILE": key}, "cannot be loaded"),
        ("TLS_CLIENT_CA_FILE", {**pair, "TLS_CLIENT_CA_FILE": missing}, "No such file"),
    ):
        (problem,) = failure(**values).problems
        assert problem.variable == variable, values
        assert reason in problem.reason, values
