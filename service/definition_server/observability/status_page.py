"""The status as an HTML page: ``/`` of the admin port. One answer, complete without scripts or other files.

A script requests the page again every few seconds and replaces the changed parts; without scripts the browser reloads
the page. The content of the page is bounded: lists are cut, and names are already cut in the status. The content
security policy allows only this script and this style, by their digests: even a script that was not escaped would not
run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from definition_server.observability.html import Html, element, joined
from definition_server.observability.next_steps import SHOWN_DIGITS, Step, Urgency, next_steps
from definition_server.observability.status import (
    HeldCommandStatus,
    PublicationStatus,
    ServiceStatus,
    WorkerStatus,
)

MOST_ROWS = 32
"""The most rows of a table. Further rows are counted."""
MOST_EVENTS = 15
RELOAD_SECONDS = 10
"""Seconds after which a browser without scripts reloads the page."""
_DISTRIBUTION = "avap-definition-server"
_DOCUMENTATION = "Documentation"

_RESTART = {
    "stored": "the served, pinned and held catalogues are on disk",
    "database_reachable": "nothing is on disk, and the table has the served catalogue",
    "nothing_served": "there is nothing to lose",
    "no_source": "neither the disk nor the database has the served catalogue",
    "held_not_stored": "a new process would publish the held catalogue",
    "pin_not_stored": "the pin, or the pinned catalogue, would be lost",
    "rows_held_not_stored": "the last good versions of bad rows are not on disk",
}
_STALE = {
    "check_late": "the last check that could read the table is too old",
    "restored": "it came from the disk, and the table was not read since",
    "catalogue_held": "a catalogue is held",
    "nothing_served": "nothing is served yet",
}


def page_headers() -> tuple[tuple[str, str], ...]:
    """The header fields of an answer with the page."""
    style, script, _ = _assets()
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return (
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Vary", "Accept"),
    )


def status_page(status: ServiceStatus, now: float) -> bytes:
    """The page. ``now``: seconds since the epoch."""
    style, script, build = _assets()
    steps = next_steps(status, now)
    sections = (
        _state(status, steps, now),
        _steps(steps),
        _catalogue(status, now),
        _publications(status.publications, now),
        _held_commands(status, now),
        _workers(status.workers),
        element("div", (_keys(status, now), _certificates(status, now)), class_="pair"),
        _events(status, now),
    )
    word = _headline(status, steps)[1]
    head = joined(
        (
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html(f'<noscript><meta http-equiv="refresh" content="{RELOAD_SECONDS}"></noscript>'),
            Html('<link rel="icon" href="data:,">'),
            element("title", f"{word} · {status.hostname}"),
            Html(f"<style>{style}</style>"),
        )
    )
    body = joined(
        (
            element(
                "header",
                (
                    element("h1", "AVAP Definition Server"),
                    element("p", f"{status.hostname} · version {status.version} · engine: {status.engine}"),
                    element("p", "", id="live", role="status"),
                ),
            ),
            element("main", sections),
            element(
                "footer",
                (
                    "As of ", _time(now), ". Also here: ",
                    Html('<a href="/statusz?format=json">/statusz</a>, <a href="/metrics">/metrics</a>, '),
                    Html('<a href="/readyz">/readyz</a>, <a href="/freshz">/freshz</a>.'),
                ),
            ),
            Html(f"<script>{script}</script>"),
        )
    )  # fmt: skip
    return (
        f'<!DOCTYPE html><html lang="en" data-build="{build}"><head>{head}</head><body>{body}</body></html>\n'.encode()
    )


# -- sections --------------------------------------------------------------------------------------------------------


def _headline(status: ServiceStatus, steps: Sequence[Step]) -> tuple[str, str]:
    """The overall state, as a class of the style and in a few words."""
    if status.stopping:
        return "warn", "Shutting down"
    if not status.ready:
        return "bad", "Not ready: nothing is served yet" if status.catalog is None else "Not ready"
    if any(step.urgency is Urgency.BAD for step in steps):
        return "bad", "Serving, act now"
    if not status.freshness.fresh:
        return "warn", "Serving, perhaps out of date"
    if any(step.urgency is Urgency.WARN for step in steps):
        return "warn", "Serving, see below"
    if status.sync.pinned is not None:
        return "warn", "Serving a pinned version"
    return "good", "Serving, up to date"


def _state(status: ServiceStatus, steps: Sequence[Step], now: float) -> Html:
    kind, words = _headline(status, steps)
    parts = [element("h2", words)]
    if (catalog := status.catalog) is not None:
        since = catalog.published_at or catalog.created_at
        parts.append(
            element(
                "p",
                (
                    f"{catalog.definitions:,} definitions, version ", _hash(catalog.version_hash), ", since ",
                    _time_and_age(since, now),
                ),
            )
        )  # fmt: skip
    safe = "Safe to restart" if status.restart.safe else "Not safe to restart"
    why = _RESTART.get(status.restart.reason, status.restart.reason)
    parts.append(element("p", (element("b", safe, class_="good" if status.restart.safe else "bad"), f": {why}.")))
    return element("section", parts, class_=f"state {kind}")


def _steps(steps: Sequence[Step]) -> Html:
    if not steps:
        return _section("What to do", element("p", "Nothing.", class_="soft"))
    words = {Urgency.BAD: "now", Urgency.WARN: "today", Urgency.NOTE: "note"}
    items = (
        element(
            "li",
            (element("b", words[step.urgency]), " ", *_with_code(step.text), " ", _link(step.page)),
            class_=step.urgency,
        )
        for step in steps
    )
    return _section("What to do", element("ol", items))


def _catalogue(status: ServiceStatus, now: float) -> Html:
    catalog, sync = status.catalog, status.sync
    fresh = "yes" if status.freshness.fresh else _STALE.get(str(status.freshness.reason), "no")
    facts: list[tuple[str, Iterable[str | Html]]] = []
    if catalog is not None:
        size = f"generation {catalog.generation}, {catalog.bytes:,} bytes, built "
        facts += [
            ("version", (element("code", catalog.version_hash),)),
            ("publication", (size, _time_and_age(catalog.created_at, now))),
        ]
    facts.append(("fresh", (element("span", fresh, class_="good" if status.freshness.fresh else "warn"),)))
    if sync.last_success is not None:
        facts.append(("last success", (_time_and_age(sync.last_success, now),)))
    if sync.last_error is not None:
        facts.append(("last cycle", (f"{sync.last_outcome}: ", element("b", sync.last_error, class_="bad"))))
    elif sync.last_failure is not None:
        facts.append(("last failure", (f"{sync.last_failure_reason or ''} ", _time_and_age(sync.last_failure, now))))
    if sync.next_attempt is not None:
        seconds = sync.next_attempt - now
        due = "now" if seconds < 1 else f"in {_length(seconds)}"
        facts.append(("next attempt", (_time(sync.next_attempt), f" ({due})")))
    if (database := status.database) is not None:
        hosts, connected = ", ".join(database.hosts), database.connected_to
        which = f", connected to {connected or 'none of them yet'}" if len(database.hosts) > 1 else ""
        facts.append(("database", (f"{database.name} at {hosts}{which}, as {database.role}",)))
    facts += _wishes(status, now)
    facts += [
        (label, (", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()) if count),))
        for label, counts in (("rows not served", sync.unserved), ("rows that look wrong", sync.suspect))
        if any(counts.values())
    ]
    rows = joined(joined((element("dt", label), element("dd", content))) for label, content in facts)
    return _section("Catalogue", element("dl", rows))


def _wishes(status: ServiceStatus, now: float) -> list[tuple[str, Iterable[str | Html]]]:
    sync = status.sync
    found: list[tuple[str, Iterable[str | Html]]] = []
    if sync.pinned is not None:
        end = (" until it is taken away",) if sync.pinned_until is None else (" until ", _time(sync.pinned_until))
        missing = ", a version that is not known here" if sync.pinned_missing else ""
        found.append(("pinned", (_hash(sync.pinned_version or ""), f" by {sync.pinned}", *end, missing)))
    if sync.held_version is not None:
        since = () if sync.held_since is None else (", since ", _time_and_age(sync.held_since, now))
        names = f", for example {', '.join(sync.held_names)}" if sync.held_names else ""
        count = f" ({sync.held_reason}), {sync.held_definitions or 0:,} definitions"
        found.append(("held catalogue", (_hash(sync.held_version), count, *since, names)))
    return found


def _publications(publications: Sequence[PublicationStatus], now: float) -> Html:
    def changes(publication: PublicationStatus) -> Html:
        if publication.added is None:
            return element("span", "not compared", class_="soft")
        counts = f"+{publication.added:,} −{publication.removed or 0:,} ~{publication.changed or 0:,}"
        names = f" {', '.join(publication.examples)}" if publication.examples else ""
        return joined((element("b", counts), element("span", names, class_="soft")))

    rows = [
        (_time_and_age(each.at, now), _hash(each.version_hash), f"{each.definitions:,}", changes(each))
        for each in publications
    ]
    return _section("Last publications", _table(("published", "version", "definitions", "changes"), rows))


def _held_commands(status: ServiceStatus, now: float) -> Html:
    held: Sequence[HeldCommandStatus] = status.held_commands
    if not held:
        return Html("")
    rows = [(element("code", each.name), each.reason, _time_and_age(each.since, now)) for each in held]
    total = sum(status.sync.rows_held.values())
    title = f"Commands held at their last good version: {max(total, len(held)):,}"
    return _section(title, _table(("name", "reason", "since"), rows, total=total))


def _workers(workers: Sequence[WorkerStatus]) -> Html:
    def state(worker: WorkerStatus) -> Html:
        kind = {"serving": "good", "down": "bad"}.get(worker.state, "warn")
        looping = ", crash loop" if worker.crash_loop else ""
        return element("span", f"{worker.state}{looping}", class_="bad" if looping else kind)

    def seconds(age: float | None) -> str:
        return "" if age is None else f"{age:.1f} s ago"

    rows = [
        (
            str(each.worker),
            state(each),
            _hash(each.version_hash) if each.version_hash else "",
            "" if each.connections is None else f"{each.connections:,}",
            f"{each.restarts:,}",
            seconds(each.heartbeat_age_seconds),
            each.jail,
        )
        for each in workers
    ]
    labels = ("worker", "state", "version", "connections", "restarts", "heartbeat", "jail")
    return _section("Workers", _table(labels, rows))


def _keys(status: ServiceStatus, now: float) -> Html:
    rows = [
        (element("code", name), _time_and_age(used, now) if used else "not since the start")
        for name, used in status.keys_last_used.items()
    ]
    return _section("Keys", _table(("id", "last used"), rows))


def _certificates(status: ServiceStatus, now: float) -> Html:
    rows = [
        (name, joined((_time(expires), f" (in {_length(expires - now)})" if expires > now else " (expired)")))
        for name, expires in status.certificates_expire.items()
    ]
    return _section("Certificates", _table(("name", "expires"), rows, none="No TLS."))


def _events(status: ServiceStatus, now: float) -> Html:
    rows = [
        (
            _time_and_age(each.at, now),
            each.kind.replace("_", " "),
            str(each.reason or ""),
            "" if each.after_seconds is None else f"after {_length(each.after_seconds)}",
        )
        for each in status.events[:MOST_EVENTS]
    ]
    return _section("Events", _table(("time", "event", "reason", "lasted"), rows, none="None since the start."))


# -- pieces ----------------------------------------------------------------------------------------------------------


def _section(title: str, content: Html) -> Html:
    return element("section", (element("h2", title), content))


def _table(
    labels: Sequence[str], rows: Sequence[Sequence[str | Html]], *, total: int = 0, none: str = "None yet."
) -> Html:
    """A table of at most `MOST_ROWS` rows, which a narrow screen shows as blocks with the labels next to the values."""
    if not rows:
        return element("p", none, class_="soft")
    head = element("thead", element("tr", (element("th", label, scope="col") for label in labels)))
    shown = [
        element(
            "tr",
            (element("td", element("span", cell), data_label=label) for label, cell in zip(labels, row, strict=True)),
        )
        for row in rows[:MOST_ROWS]
    ]
    more = max(total, len(rows)) - len(shown)
    rest = element("p", f"… and {more:,} more", class_="soft") if more > 0 else Html("")
    return joined((element("table", (head, element("tbody", shown))), rest))


def _hash(version_hash: str) -> Html:
    return element("code", version_hash[:SHOWN_DIGITS], title=version_hash)


def _time(seconds: float) -> Html:
    moment = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return element("time", moment, datetime=moment)


def _time_and_age(seconds: float, now: float) -> Html:
    return joined((_time(seconds), element("span", f" ({_length(max(0.0, now - seconds))} ago)", class_="soft age")))


def _length(seconds: float) -> str:
    for unit, size, most in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def _with_code(sentence: str) -> list[str | Html]:
    """A sentence of `next_steps`. Text between backticks becomes code."""
    parts = sentence.split("`")
    return [element("code", part) if number % 2 else part for number, part in enumerate(parts)]


def _link(page: str) -> Html:
    base = _documentation()
    name = f"docs/{page}"
    return element("code", name) if base is None else element("a", name, href=f"{base}/{page}", rel="noreferrer")


@cache
def _documentation() -> str | None:
    """The address of the folder ``docs``; None if the build named no such address."""
    try:
        links = metadata(_DISTRIBUTION).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    for link in links:
        label, _, address = link.partition(", ")
        if label == _DOCUMENTATION and address.startswith(("https://", "http://")):
            return str(address).rpartition("/")[0]
    return None


@cache
def _assets() -> tuple[str, str, str]:
    """The style, the script, and a text that differs between builds."""
    folder = Path(__file__).parent
    style, script = ((folder / f"status_page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return style, script, hashlib.sha256((style + script).encode()).hexdigest()[:SHOWN_DIGITS]


def _digest(content: str) -> str:
    """The source expression that allows an inline element of that content (CSP Level 3, 2.3.1)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
