"""The page for people: all content of the table is shown as text, the size of the page is bounded, and it shows the
state of the server."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from tests.support.fakes import service_status

from definition_server.observability.html import Html, element, text
from definition_server.observability.reasons import Reason
from definition_server.observability.status import (
    DatabaseStatus,
    EventStatus,
    FreshnessStatus,
    HeldCommandStatus,
    PublicationStatus,
    RestartStatus,
    ServiceStatus,
    WorkerStatus,
)
from definition_server.observability.status_page import page_headers, status_page

NOW = 1_700_000_100.0
EVIL = '<img src=x onerror="alert(1)">\'</script><script>alert(2)</script><!--\u202e\x1b[31m&lt;'
SHOWN = '<img src=x onerror="alert(1)">\'</script><script>alert(2)</script><!--\\u202e\\x1b[31m&lt;'


def hostile() -> ServiceStatus:
    """A status in which every text is hostile."""
    status = service_status(hostname=EVIL, version=EVIL, engine=EVIL)
    sync = replace(
        status.sync, pinned=EVIL, pinned_version=EVIL, held_version=EVIL, held_definitions=1, held_names=(EVIL,),
        last_outcome=EVIL, last_error=Reason.TABLE_EMPTY, unserved={EVIL: 1}, suspect={EVIL: 1}, rows_held={EVIL: 1},
        next_attempt=NOW,
    )  # fmt: skip
    return replace(
        status,
        sync=sync,
        freshness=FreshnessStatus(False, EVIL),
        restart=RestartStatus(False, EVIL),
        publications=(PublicationStatus(NOW, EVIL, 1, 1, 1, 1, (EVIL,)),),
        held_commands=(HeldCommandStatus(EVIL, EVIL, NOW),),
        workers=(WorkerStatus(0, 1, EVIL, 1, EVIL, 1, 0.1, 0, False, 1, EVIL, EVIL),),
        database=DatabaseStatus((EVIL, EVIL), EVIL, EVIL, EVIL),
        keys_last_used={EVIL: NOW},
        certificates_expire={EVIL: NOW},
        events=(EventStatus(NOW, EVIL, Reason.TABLE_EMPTY, 1.0),),
    )


class Reader(HTMLParser):
    """The parts of a page that a browser sees: tags with attributes, and text outside scripts and styles."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self._raw = False
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.inline:
            self.inline[self._inside].append(data)
        else:
            self.shown.append(data)


def read(status: ServiceStatus) -> Reader:
    return Reader(status_page(status, NOW))


def test_any_name_is_shown_as_text_on_the_page() -> None:
    plain, page = read(service_status()), read(hostile())
    allowed = {tag for tag, _ in plain.tags} | {"ol", "li", "table", "thead", "tbody", "tr", "th", "td", "code", "a"}
    assert {tag for tag, _ in page.tags} <= allowed
    assert "img" not in allowed
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    whole = "".join(page.shown)
    assert whole.count(SHOWN) > 10
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e]", whole)


def test_text_in_an_attribute_stays_in_it() -> None:
    assert element("p", "a", title='" onload="x') == '<p title="&quot; onload=&quot;x">a</p>'
    assert element("td", ("<", Html("<b>")), data_label="x", class_=None) == '<td data-label="x">&lt;<b></td>'
    assert text("'") == "&#x27;"


def test_the_policy_allows_exactly_the_script_and_the_style_of_the_page() -> None:
    policy = dict(page_headers())["Content-Security-Policy"]
    page = read(hostile())
    for kind in ("script", "style"):
        (content,) = ["".join(page.inline[kind])]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_the_page_refers_to_no_other_server() -> None:
    for tag, attributes in read(hostile()).tags:
        for name in ("src", "href", "action"):
            target = attributes.get(name)
            assert target is None or target == "data:," or re.match(r"/(?!/)", target), (tag, target)


def test_without_scripts_the_page_is_loaded_again() -> None:
    page = status_page(service_status(), NOW).decode()
    assert re.search(r'<noscript><meta http-equiv="refresh" content="\d+"></noscript>', page)
    assert 'name="viewport" content="width=device-width' in page


def test_the_size_of_the_page_is_bounded() -> None:
    name = "\U000e0001" * 64
    status = service_status(
        publications=tuple(PublicationStatus(NOW, "a" * 64, 1, 1, 1, 1, (name,) * 30) for _ in range(10)),
        held_commands=tuple(HeldCommandStatus(name, "code_invalid", NOW) for _ in range(20)),
        workers=tuple(WorkerStatus(n, 1, "serving", 1, "a" * 64, 1, 0.1, 0, False) for n in range(1000)),
        keys_last_used={f"key{n}": NOW for n in range(1000)},
        events=tuple(EventStatus(NOW, "sync_failed", Reason.TABLE_EMPTY, None) for _ in range(50)),
    )
    page = status_page(status, NOW)
    assert len(page) < 320_000
    assert "… and 968 more" in page.decode()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (service_status(), "Serving, up to date"),
        (service_status(stopping=True, ready=False), "Shutting down"),
        (service_status(ready=False), "Not ready"),
        (service_status(ready=False, catalog=None), "Not ready: nothing is served yet"),
        (
            service_status(sync=replace(service_status().sync, pinned="command", pinned_version="ab" * 32)),
            "Serving a pinned version",
        ),
        (service_status(freshness=FreshnessStatus(False, "check_late")), "Serving, perhaps out of date"),
        (service_status(certificates_expire={"server": NOW - 1}), "Serving, act now"),
        (service_status(certificates_expire={"server": NOW + 1000}), "Serving, see below"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_headline_and_the_title_show_the_state_of_the_server(status: ServiceStatus, words: str) -> None:
    page = status_page(status, NOW).decode()
    assert f"<h2>{words}</h2>" in page
    assert f"<title>{words} · replica-0</title>" in page


def test_the_page_shows_times_changes_held_commands_and_whether_a_restart_is_safe() -> None:
    status = service_status()
    assert status.catalog is not None
    status = replace(
        status,
        catalog=replace(status.catalog, published_at=NOW - 300),
        publications=(
            PublicationStatus(NOW - 300, "ab" * 32, 2, 1, 0, 2, ("+ new",)),
            PublicationStatus(5, "c" * 64, 1),
        ),
        held_commands=(HeldCommandStatus("sendMail", "code_invalid", NOW - 60),),
        sync=replace(
            status.sync, rows_held={"code_invalid": 3}, next_attempt=NOW + 39, pinned="policy",
            pinned_version="cd" * 32, pinned_until=NOW + 7200, last_failure=NOW - 86_400 * 3,
            last_failure_reason=Reason.TABLE_LOCKED,
        ),
        database=DatabaseStatus(("db:5432",), "avap", "reader", "db:5432"),
        restart=RestartStatus(False, "pin_not_stored"),
        keys_last_used={"2026-11": 0},
        certificates_expire={"server": NOW + 86_400 * 40},
    )  # fmt: skip
    shown = " ".join("".join(read(status).shown).split())
    for words in (
        "version abababababababab, since 2023-11-14T22:10:00Z (5 min ago)",
        "Not safe to restart: the pin, or the pinned catalogue, would be lost.",
        "+1 −0 ~2 + new", "not compared", "sendMail", "held at their last good version: 3", "… and 2 more",
        "2023-11-14T22:15:39Z (in 39 s)", "avap at db:5432, as reader",
        "cdcdcdcdcdcdcdcd by policy until 2023-11-15T00:15:00Z",
        "table_locked 2023-11-11T22:15:00Z (3 days ago)", "2026-11", "not since the start", "(in 40 days)",
    ):  # fmt: skip
        assert words in shown, words
