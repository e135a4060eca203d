"""Secrets are read from variables or files, and cleaned in the same way. An unusable secret is one problem, and no
secret is shown."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import pytest
from tests.support.environments import MARK, REQUIRED, environment, failure, load, secret_file

from definition_server.environment import (
    SettingsError,
    effective,
    inherited_environment,
    is_secret,
    load_settings,
    variables,
    without_user_information,
)
from definition_server.settings import Settings

SECRETS = (
    "DATABASE_URL",
    "API_KEY",
    "API_KEYS",
    "AVAP_INTERNAL_KEY",
    "AVAP_INTERNAL_KEY_PREVIOUS",
    "OTEL_EXPORTER_OTLP_HEADERS",
)
SINGLE = ("DATABASE_URL", "API_KEY", "AVAP_INTERNAL_KEY")
"""The secrets that hold one value and not a list."""


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
def test_secrets_from_variables_and_files_are_cleaned_in_the_same_way(
    name: str, around: str, kept: bool, source: str, tmp_path: Path
) -> None:
    """Line ends and a byte order mark are dropped. Other white space at the ends might be intended, so it is
    refused."""
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
    assert f"override it with {variable}_FILE=" in problem.remedy  # if a base image or manifest sets the other one


def test_a_file_that_a_base_names_is_overridden_by_an_empty_variable() -> None:
    assert load(API_KEY="mine", API_KEY_FILE="").keys_by_id() == {"default": "mine"}


def test_a_problem_of_a_secret_files_content_is_reported_masked(tmp_path: Path) -> None:
    (problem,) = failure(API_KEY="", API_KEY_FILE=secret_file(tmp_path, "clé".encode())).problems
    assert (problem.variable, problem.value) == ("API_KEY", "********")


def test_an_empty_file_name_is_treated_as_unset() -> None:
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


@pytest.mark.parametrize("variable", SECRETS)
@pytest.mark.parametrize("given", [MARK, f"postgresql://u:{MARK}@h/d", f"key:{MARK}"])
@pytest.mark.parametrize("twice", [False, True])
def test_a_secret_that_is_given_in_place_of_its_file_is_not_shown(variable: str, given: str, twice: bool) -> None:
    error = failure(**{variable: "postgresql://h/d" if twice else "", f"{variable}_FILE": given})
    assert (f"{variable}_FILE", "********") in [(problem.variable, problem.value) for problem in error.problems]
    assert MARK not in str(error)


@pytest.mark.parametrize("path", ["/missing/key", "./missing", "../missing"])
def test_the_path_of_a_missing_secret_file_is_shown(path: str) -> None:
    (problem,) = failure(API_KEY="", API_KEY_FILE=path).problems
    assert problem.value == path


def test_a_secret_file_in_the_working_directory_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path(secret_file(tmp_path, b"")).name
    (problem,) = failure(API_KEY="", API_KEY_FILE=name).problems
    assert problem.value == name


URLS = {
    f"http://u:{MARK}@h:4318/v1": "http://********@h:4318/v1",
    f"http://u:a/{MARK}?#@h": "http://********@h",
    f"http://u:a@{MARK}@h": "http://********@h",
    f"http://u:a {MARK}\n@h": "http://********@h",
    f"//u:{MARK}@h": "//********@h",
    f"u:{MARK}@h:4318": "********@h:4318",
    f"http:/u:{MARK}@h": "********@h",
    "http://h:4318/v1": "http://h:4318/v1",
    "/srv/avap@1": "/srv/avap@1",
    "srv/avap@1": "srv/avap@1",
    "::": "::",
}


@pytest.mark.parametrize("url", URLS, ids=range(len(URLS)))
def test_the_user_information_of_a_url_is_hidden_whatever_its_password_is(url: str) -> None:
    assert without_user_information(url) == URLS[url]
    for variable in ("OTEL_EXPORTER_OTLP_ENDPOINT", "TRANSPORT", "WORKERS", "HOST"):
        try:
            shown = str(effective(load(**{variable: url})))
        except SettingsError as error:
            shown = str(error)
        assert MARK not in shown


@pytest.mark.parametrize("url", ["Postgres://u:p@h/d", "POSTGRESQL://h/d"])
def test_a_scheme_in_capitals_is_refused_with_the_reason(url: str) -> None:
    (problem,) = failure(DATABASE_URL=url).problems
    assert "small letters" in problem.reason
    assert "percent-encode" in problem.remedy


def test_a_check_from_outside_gets_a_valid_value_and_its_reason_is_reported() -> None:
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
