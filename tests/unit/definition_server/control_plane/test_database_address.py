"""The hosts and names of a connection, and their shares of the time to connect; no text about a URL shows its
secret."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import AsyncConnection
from tests.support.polling import until

from definition_server.control_plane.database_address import (
    MASK,
    Host,
    NameResolver,
    Redaction,
    hosts_of,
    misplaced_fault,
    shares,
)
from definition_server.control_plane.postgres import PostgresSource, database_address, redaction, url_fault
from definition_server.control_plane.source import SourceError

MARK = "S3cret"

REFUSED_URLS = {
    f"Postgres://u:{MARK}@127.0.0.1:1/db": "libpq cannot parse it",
    f"host=127.0.0.1 password={MARK} user": "libpq cannot parse it",
    f"host=127.0.0.1 password='{MARK}": "libpq cannot parse it",
    f"postgresql://u:{MARK}%@127.0.0.1:1/db": "%25",
    f"postgresql://u:{MARK}%zz@127.0.0.1:1/db": "%25",
    f"postgresql://u:{MARK}%00@127.0.0.1:1/db": "%00",
    f"postgresql://u:{MARK} x@127.0.0.1:1/db": "%20",
    f"postgresql://u:x@127.0.0.1:1/db?{MARK}": "name=value",
    f"postgresql://u:x@127.0.0.1:1/db?{MARK}=1": "libpq does not know",
    f"postgresql://u:x@127.0.0.1:1/db?pasword={MARK}": "libpq does not know",
    f"postgresql://u:x@127.0.0.1:1/db?options=-c%20a={MARK}": "%3D",
    f"postgresql://u:{MARK}@[::1/db": "IPv6",
    f"postgresql://u:{MARK}@[::1]x/db": "IPv6",
    f"postgresql://u:{MARK}@127.0.0.1:1{MARK}/db": "port",
    f"postgresql://u:{MARK}@127.0.0.1:99999/db": "port",
    f"postgresql://u:{MARK}@127.0.0.1:0/db": "port",
    f"postgresql://u:x@{MARK}@127.0.0.1:1/db": "%40",
    f"postgresql://u:{MARK}/x@127.0.0.1:1/db": "%2F",
    f"postgresql://u:5432/{MARK}@127.0.0.1:1/db": "%2F",
    f"postgresql://u:{MARK}@127.0.0.1,127.0.0.2/db?port=1,2,3": "ports than hosts",
    f"postgresql://u:x@127.0.0.1:1/db?sslmode={MARK}": f'invalid sslmode value: "{MASK}"',
    f"postgresql://u:x@127.0.0.1:1/db?target_session_attrs={MARK}": MASK,
    f"postgresql://u:x@127.0.0.1:1/db?require_auth={MARK}": MASK,
    f"postgresql://u:x@127.0.0.1:1/db?service={MARK}": f'service "{MASK}" not found',
}
"""URL → a part of the reason."""

ACCEPTED_URLS = [
    f"postgresql://u:{MARK}@127.0.0.1:1/db",
    f"postgresql://u:{MARK}[1]@127.0.0.1:1/db",
    f"postgresql://u:{MARK}%40%2F%25@127.0.0.1:1/db",
    f"postgresql://u:{MARK}?#@127.0.0.1:1/db",
    f"postgresql://127.0.0.1:1/db?user=u@realm&password={MARK}",
    f"postgresql://u@127.0.0.1:1/db?password={MARK}&sslpassword={MARK}",
    f"postgresql://u:x@127.0.0.1:1/db?options=-c%20a%3D{MARK}",
    f"postgresql://u:{MARK}@127.0.0.1:1,127.0.0.2:1/db?target_session_attrs=prefer-standby",
    f"postgresql://u:{MARK}@/db?host=/nowhere",
    f"postgresql://u:{MARK}@no-such-host.invalid/db",
]
"""URLs that libpq accepts, but at which there is no database."""


def url_id(url: str) -> str:
    return url.replace(MARK, "_")


# -- the parts of a URL that are shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [*ACCEPTED_URLS, *REFUSED_URLS], ids=url_id)
def test_the_address_of_a_database_holds_no_secret_of_its_url(url: str) -> None:
    address = database_address(url)
    assert MARK not in f"{address} {address and address.url()} {address and address.role}"
    assert (address is not None) or url not in ACCEPTED_URLS


def test_the_address_of_a_database_has_hosts_port_name_and_role_with_the_defaults_of_libpq(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGUSER", "reader")
    address = database_address(f"postgresql://a.example,[::1]:5433/my%20avap?password={MARK}")
    assert address is not None
    assert (address.hosts, address.name, address.role) == (("a.example:5432", "[::1]:5433"), "my avap", "reader")
    assert address.url() == f"postgresql://reader:{MASK}@a.example:5432,[::1]:5433/my%20avap"


def test_a_database_without_a_name_has_the_name_of_the_role() -> None:
    address = database_address("postgresql://reader@/?host=/run/postgresql")
    assert address is not None
    assert str(address) == "/run/postgresql:5432/reader"


async def test_a_source_that_gets_another_url_shows_the_other_address() -> None:
    source = PostgresSource("postgresql://u:x@a:1/db", connect_timeout=1, statement_timeout=1)
    await source.use_url("postgresql://u:x@b:2/db")
    assert source.address is not None
    assert (source.address.hosts, source.connected_to) == (("b:2",), None)


# -- URLs that libpq does not accept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("url", REFUSED_URLS, ids=url_id)
def test_a_url_that_libpq_does_not_accept_is_refused_without_showing_its_secret(url: str) -> None:
    fault = url_fault(url)
    assert fault is not None
    assert REFUSED_URLS[url] in fault
    assert MARK not in fault


@pytest.mark.parametrize("url", ACCEPTED_URLS, ids=url_id)
def test_a_url_that_libpq_accepts_is_not_refused(url: str) -> None:
    assert url_fault(url) is None


@given(st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), max_size=12), st.integers(0, 40))
def test_the_judgement_of_any_url_does_not_show_its_secret(noise: str, place: int) -> None:
    url = f"postgresql://u:{MARK}@127.0.0.1:1/db?sslmode=require"
    fault = url_fault(url[:place] + noise + url[place:]) or ""
    assert MARK not in fault


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [*REFUSED_URLS, *ACCEPTED_URLS], ids=url_id)
async def test_no_output_of_a_failed_connection_shows_a_secret(
    url: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    source = PostgresSource(url, connect_timeout=2, statement_timeout=2)
    with pytest.raises(SourceError) as caught:
        async with source.read():
            pass
    await source.close()
    shown = io.StringIO()
    traceback.print_exception(caught.value, file=shown)
    output = capfd.readouterr()
    for text in (str(caught.value), repr(caught.value), shown.getvalue(), output.out, output.err):
        assert MARK not in text
    assert not [record for record in caplog.records if record.name.startswith("psycopg")]


@pytest.mark.parametrize("secret", ["S3c'ret\\x", "pass word", "p@ss/w%rd", "päss", "pw", "x.y"])
def test_a_secret_is_masked_in_every_form_that_a_text_may_have(secret: str) -> None:
    redacted = Redaction("postgresql://h/d", ({"user": "reader", "password": secret, "port": "5432"},))
    for form in (secret, quote(secret, safe=""), repr(secret)[1:-1], secret.replace("\\", "\\\\").replace("'", "\\'")):
        cleaned = redacted.clean(f'invalid "{form}" for reader at port 5432')
        assert form not in cleaned
        assert cleaned == f'invalid "{MASK}" for reader at port 5432'


def test_a_short_password_is_masked_as_a_word_but_not_within_words() -> None:
    assert Redaction("postgresql://h/d", ({"password": "e"},)).clean("e: refused") == f"{MASK}: refused"


def test_a_password_that_is_the_user_s_name_does_not_mask_the_name() -> None:
    redacted = Redaction("postgresql://h/d", ({"user": "reader", "password": "reader"},))
    assert redacted.clean('role "reader" does not exist') == 'role "reader" does not exist'


def test_secrets_that_libpq_adds_are_masked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "services").write_text(f"[prod]\nhost=127.0.0.1\nport=1\npassword={MARK}\n", encoding="ascii")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    assert redaction("postgresql:///db?service=prod").clean(f"x {MARK}") == f"x {MASK}"
    monkeypatch.setenv("PGPASSWORD", "0ther-secret")
    assert redaction("postgresql://h/db").clean("x 0ther-secret") == f"x {MASK}"


# -- hosts and time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [Host("", "", "")]),
        ({"host": "a", "port": "1"}, [Host("a", "", "1")]),
        ({"host": "a,b", "port": "1"}, [Host("a", "", "1"), Host("b", "", "1")]),
        ({"host": "a,b", "port": "1,2"}, [Host("a", "", "1"), Host("b", "", "2")]),
        ({"host": "a,b", "hostaddr": "1.1.1.1,2.2.2.2"}, [Host("a", "1.1.1.1", ""), Host("b", "2.2.2.2", "")]),
        ({"hostaddr": "1.1.1.1,2.2.2.2"}, [Host("", "1.1.1.1", ""), Host("", "2.2.2.2", "")]),
    ],
)
def test_lists_of_hosts_addresses_and_ports_are_read_side_by_side(
    parameters: dict[str, str], expected: list[Host]
) -> None:
    assert hosts_of(parameters) == expected


@pytest.mark.parametrize("parameters", [{"host": "a,b", "port": "1,2,3"}, {"host": "a,b", "hostaddr": "1.1.1.1"}])
def test_lists_of_different_lengths_are_refused(parameters: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="than hosts"):
        hosts_of(parameters)


@pytest.mark.parametrize(
    ("host", "needed"),
    [("db", True), ("db.example.", True), ("127.0.0.1", False), ("::1", False), ("/run", False), ("", False)],
)
def test_an_address_needs_no_name_service(host: str, needed: bool) -> None:
    assert Host(host, "", "").needs_name_service is needed
    assert not Host(host, "10.0.0.1", "").needs_name_service


def test_time_that_a_host_does_not_use_is_left_to_the_hosts_after_it() -> None:
    clock = [100.0]
    given_seconds = []
    for item, seconds in shares(["silent", "refuses", "works"], 109.0, lambda: clock[0]):
        given_seconds.append(seconds)
        clock[0] += seconds if item == "silent" else 0.5
    assert given_seconds == [3.0, 3.0, 5.5]


# -- names -------------------------------------------------------------------------------------------------------------


class DeafNameService:
    """A name service that answers no query until it is released."""

    def __init__(self) -> None:
        self.asked = 0
        self.released = threading.Event()

    def look_up(self, *_: object, **__: object) -> list[object]:
        self.asked += 1
        self.released.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]


async def test_a_name_service_that_never_answers_blocks_one_thread_per_name_but_not_the_loop() -> None:
    deaf = DeafNameService()
    resolver = NameResolver(deaf.look_up)
    try:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.01)  # a free loop counts a hundred turns a second

        counting = asyncio.create_task(count())
        for _ in range(3):
            with pytest.raises(TimeoutError, match="name service"):
                await resolver.addresses("db.example", 0.1)
        counting.cancel()
        assert turns > 5
        assert deaf.asked == 1
        (thread,) = [each for each in threading.enumerate() if each.name == "resolve-db.example"]
        assert thread.daemon  # a daemon thread delays neither the end of the loop nor that of the process
    finally:
        deaf.released.set()
    assert await resolver.addresses("db.example", 5) == ["127.0.0.1"]
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("resolve-")], lambda: "threads")


async def test_a_name_that_does_not_exist_is_an_error_with_the_name() -> None:
    with pytest.raises(OSError, match=r"no-such-host\.invalid cannot be resolved"):
        await NameResolver().addresses("no-such-host.invalid", 20)


async def test_the_look_up_of_the_database_s_name_ends_after_the_connect_timeout() -> None:
    deaf = DeafNameService()
    source = PostgresSource(
        "postgresql://u:x@db.example/db",
        connect_timeout=0.5,
        statement_timeout=2,
        resolver=NameResolver(deaf.look_up),
    )
    started = time.monotonic()
    try:
        with pytest.raises(SourceError, match="name service"):
            async with source.read():
                pass
        assert time.monotonic() - started < 20, "the name service never answers"
    finally:
        deaf.released.set()


async def test_keepalives_end_the_connection_to_a_vanished_database_after_25_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    async def connect(_: str, **options: Any) -> None:
        seen.update(options)
        raise OSError("nothing is here")

    monkeypatch.setattr(AsyncConnection, "connect", connect)
    source = PostgresSource("postgresql://u:x@127.0.0.1:1/db", connect_timeout=1, statement_timeout=2)
    with pytest.raises(SourceError, match="nothing is here"):
        async with source.read():
            pass
    assert (seen["keepalives"], seen["keepalives_idle"]) == (1, 10)
    assert (seen["keepalives_interval"], seen["keepalives_count"]) == (5, 3)
    assert seen["tcp_user_timeout"] == 2000, "the statement timeout, in ms"


async def test_every_host_and_address_is_tried_within_the_connect_timeout() -> None:
    """The first two hosts accept the connection and never answer. The last host refuses it, and the error reports this
    refusal."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = ",".join(str(each.getsockname()[1]) for each in silent)
        url = f"postgresql://u:x@127.0.0.1,127.0.0.1,127.0.0.2/db?port={ports},1"
        source = PostgresSource(url, connect_timeout=1, statement_timeout=2)
        with pytest.raises(SourceError) as caught:
            async with source.read():
                pass
    assert "refused" in str(caught.value)
    assert str(caught.value).count("no answer from the database within") == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "failed: Connection refused\n\tIs the server running?\n",
            "failed: Connection refused. Is the server running?",
        ),
        ("it ends.\nHINT:  so", "it ends. HINT: so"),
        ("column\nof the table", "column of the table"),
    ],
    ids=["libpq", "ended", "one sentence"],
)
def test_lines_of_libpq_become_sentences_of_one_line(text: str, line: str) -> None:
    assert Redaction("postgresql://db/avap", []).clean(text) == line


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        ({}, None),
        ({"port": "1"}, None),
        ({"port": "65535"}, None),
        ({"port": "5432,,5433"}, None),
        ({"port": "0"}, "the port"),
        ({"port": "65536"}, "the port"),
        ({"port": "5432,0"}, "the port"),
        ({"port": "x"}, "the port"),
        ({"port": "\u0661"}, "the port"),
        ({"port": "1000001"}, "the port"),
        ({"host": "a@b"}, "the host"),
        ({"dbname": "a@b"}, "the database's name"),
        ({"dbname": "a@b", "user": "u"}, None),
    ],
    ids=str,
)
def test_a_part_of_the_password_in_another_part_of_the_url_is_reported(
    parameters: dict[str, str], fault: str | None
) -> None:
    found = misplaced_fault(parameters)
    assert found is None if fault is None else found is not None and found.startswith(fault)
