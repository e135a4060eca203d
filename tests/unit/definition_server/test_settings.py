"""The environment is read once, completely and strictly: all problems are reported at once with variable, masked value
and remedy. Old names and secret files are read too, by a fixed precedence. No secret is ever shown, and the reference
page matches the declaration.
"""

from __future__ import annotations

import base64
import os
import subprocess
from pathlib import Path

import pydantic
import pytest
from tests.support.certificates import Authority
from tests.support.environments import DECLARATIONS, FIELDS, MARK, REQUIRED, environment, failure, load, secret_file

from definition_server.api_keys import LONGEST_KEY
from definition_server.cli.client_settings import ClientSettings
from definition_server.cli.reference import settings_epilog, settings_page
from definition_server.cpus import granted_cpus
from definition_server.environment import (
    Problem,
    SettingsError,
    default_text,
    is_secret,
    load_settings,
    notices,
    remedy,
    variables,
)
from definition_server.settings import Settings

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
        "NODE_ENV": "staging",  # under the name that was set
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
        {"DRAIN_WAIT_SECONDS": "25"},  # the other one has its default
        {"DRAIN_TIMEOUT_SECONDS": "5"},
    ],
)
def test_the_drain_timeout_must_exceed_the_wait_even_if_one_is_a_default(values: dict[str, str]) -> None:
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
        ("WORKERS", "1" * 19, "too many digits"),
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
        ("MAX_CONNECTION", "MAX_CONNECTIONS"),
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
def test_a_variable_of_another_server_is_noticed_once_with_its_counterpart_here(name: str, said: str) -> None:
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
def test_the_old_name_of_app_env_is_read_if_the_new_one_is_unset(values: dict[str, str], expected: str) -> None:
    assert load(**values).app_env == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"UV_THREADPOOL_SIZE": "128"}, 128),
        ({"THREADPOOL_SIZE": "8", "UV_THREADPOOL_SIZE": "128"}, 8),
        ({"THREADPOOL_SIZE": "", "UV_THREADPOOL_SIZE": "128"}, 128),
    ],
)
def test_the_old_name_of_threadpool_size_is_read_if_the_new_one_is_unset(values: dict[str, str], expected: int) -> None:
    assert load(**values).threadpool_size == expected


def test_an_empty_variable_is_treated_as_unset() -> None:
    optional = [variables(f) for f in Settings.model_fields.values() if default_text(f)[:8] != "required"]
    assert load(**{name: "" for names in optional for name in names}) == load()
    assert [problem.value for problem in failure(DATABASE_URL="", API_KEY="").problems] == [None, None]


def test_variables_in_another_case_and_unknown_variables_are_ignored() -> None:
    assert load(port="1", database_url="x", DATABASE_URI="y") == load()


def test_an_override_takes_precedence_over_any_of_its_variables() -> None:
    with environment(**REQUIRED, PORT="1", NODE_ENV="production"):
        settings = load_settings(Settings, PORT="2", APP_ENV="development")
    assert (settings.port, settings.app_env) == (2, "development")


@pytest.mark.parametrize("variable", ["PORT", "HOST", "REFLECTION", "WORKERS", "SYNC_INTERVAL_SECONDS", "SNAPSHOT_DIR"])
def test_an_override_of_none_has_the_effect_of_an_unset_variable(variable: str) -> None:
    with environment(**REQUIRED, **{variable: "x"}):
        assert load_settings(Settings, **{variable: None}) == load()
    with environment(**REQUIRED), pytest.raises(SettingsError) as caught:
        load_settings(Settings, DATABASE_URL=None)
    assert [(each.value, each.reason) for each in caught.value.problems] == [(None, "it is required")]


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
        settings.port = 1


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
def test_help_and_reference_page_name_every_variable_with_its_description(
    cls: type[Settings] | type[ClientSettings], name: str
) -> None:
    field = cls.model_fields[name]
    page, epilog = settings_page(), " ".join(settings_epilog(cls).split())  # the help text is wrapped
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
    rsa = tmp_path / "rsa"
    subprocess.run(["openssl", "genrsa", "-out", rsa, "2048"], check=True, capture_output=True)
    pair = {"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}
    for variable, values, reason in (
        ("TLS_KEY_FILE", {"TLS_CERT_FILE": cert}, "belong together"),
        ("TLS_KEY_FILE", {"TLS_KEY_FILE": key}, "belong together"),
        ("TLS_KEY_FILE", {**pair, "TLS_KEY_FILE": str(other.key)}, "the key does not belong to the certificate"),
        ("TLS_KEY_FILE", {**pair, "TLS_KEY_FILE": str(rsa)}, "the key does not belong to the certificate"),
        ("TLS_KEY_FILE", {**pair, "TLS_KEY_FILE": missing}, "No such file"),
        ("TLS_CERT_FILE", {**pair, "TLS_CERT_FILE": missing}, "No such file"),
        ("TLS_CERT_FILE", {**pair, "TLS_CERT_FILE": key}, "it holds no certificate in PEM"),
        ("TLS_KEY_FILE", {**pair, "TLS_KEY_FILE": cert}, "it holds no private key in PEM"),
        ("TLS_KEY_FILE", {**pair, "TLS_KEY_FILE": str(tmp_path / "locked")}, "the key is encrypted"),
        ("TLS_CLIENT_CA_FILE", {"TLS_CLIENT_CA_FILE": cert}, "needs TLS_CERT_FILE and TLS_KEY_FILE"),
        ("TLS_CLIENT_CA_FILE", {**pair, "TLS_CLIENT_CA_FILE": key}, "it holds no certificate in PEM"),
        ("TLS_CLIENT_CA_FILE", {**pair, "TLS_CLIENT_CA_FILE": missing}, "No such file"),
    ):
        (problem,) = failure(**values).problems
        assert problem.variable == variable, values
        assert reason in problem.reason, values


TLS_FILES = {
    "pipe": "it is not a regular file",
    "directory": "it is not a regular file",
    "device": "it is not a regular file",
    "empty": "the file is empty",
    "blank": "the file is empty",
    "der": "it looks like DER",
    "utf-16": "in PEM",
    "text": "in PEM",
    "cut": "cannot be loaded",
    "large": "it has more than 1 MiB",
}
"""Mistake in a file of TLS → a part of the reason."""


@pytest.mark.parametrize("kind", TLS_FILES)
@pytest.mark.parametrize("variable", ["TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CLIENT_CA_FILE"])
def test_an_unusable_tls_file_is_refused_at_once_with_a_reason(variable: str, kind: str, tmp_path: Path) -> None:
    """A pipe would delay the start until a process writes to it."""
    authority = Authority(tmp_path)
    made = authority.sign("server")
    values = {
        "TLS_CERT_FILE": str(made.cert), "TLS_KEY_FILE": str(made.key), "TLS_CLIENT_CA_FILE": str(authority.cert),
    }  # fmt: skip
    sound, odd = Path(values[variable]).read_bytes(), tmp_path / "odd"
    first_line = sound.splitlines()[0]
    contents = {
        "empty": b"", "blank": b" \n\n", "text": b"not a certificate\n", "utf-16": sound.decode().encode("utf-16"),
        "der": base64.b64decode(b"".join(line for line in sound.splitlines() if not line.startswith(b"-----"))),
        "cut": first_line + b"\n", "large": sound + b"#" * 1024 * 1024,
    }  # fmt: skip
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "directory":
        odd.mkdir()
    elif kind == "device":
        odd.symlink_to("/dev/zero")
    else:
        odd.write_bytes(contents[kind])
    (problem,) = failure(**values | {variable: str(odd)}).problems
    assert TLS_FILES[kind] in problem.reason
    assert "_ssl.c" not in problem.reason
    assert problem.variable == variable


@pytest.mark.parametrize("order", ["key first", "certificate first"])
def test_a_certificate_and_its_key_may_be_in_one_file(order: str, tmp_path: Path) -> None:
    made = Authority(tmp_path).sign("server")
    both = [made.key.read_bytes(), made.cert.read_bytes()]
    made.cert.write_bytes(b"".join(both if order == "key first" else reversed(both)))
    assert load(TLS_CERT_FILE=str(made.cert), TLS_KEY_FILE=str(made.cert)).tls_key_file == made.cert


@pytest.mark.parametrize("change", [b"\xef\xbb\xbf", b"# a comment\r\n"], ids=["byte order mark", "comment"])
def test_tls_files_with_a_mark_comments_and_carriage_returns_are_accepted(change: bytes, tmp_path: Path) -> None:
    made = Authority(tmp_path).sign("server")
    for path in (made.cert, made.key):
        path.write_bytes(change + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load(TLS_CERT_FILE=str(made.cert), TLS_KEY_FILE=str(made.key)).tls_cert_file == made.cert
