"""The page of the metrics port in a real browser: nothing exceeds its frame, wide and narrow, light and dark; the page
follows the server; and no name in it runs as a script.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from tests.judges.browser import chromium, inked
from tests.support.fakes import service_status
from tests.support.polling import until

from definition_server.control_plane.admin import AdminServer
from definition_server.observability.reasons import Reason
from definition_server.observability.status import (
    DatabaseStatus,
    HeldCommandStatus,
    PublicationStatus,
    ServiceStatus,
    WorkerStatus,
)
from definition_server.observability.status_page import status_page

NOW = 1_700_000_100.0
EVIL = '<img src=x onerror="document.title=1"></script><script>document.title="run"</script>'
# The script examines the page from inside, and writes the results into an element. The page's own policy would forbid
# this script.
PROBE = """
<script>
addEventListener("load", () => {
  const seen = {title: document.title, page: getComputedStyle(document.body).backgroundColor};
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.width = document.documentElement.clientWidth;
  seen.out = [...document.querySelectorAll("main *")].filter(
    each => each.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length;
  seen.small = [...document.querySelectorAll("main *")].filter(
    each => each.textContent && parseFloat(getComputedStyle(each).fontSize) < 11).length;
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  document.body.append(told);
});
</script>
"""
COPY = """
<script>
addEventListener("load", () => {
  const copy = document.createElement("pre");
  copy.id = "copy";
  copy.textContent = frames[0].document.getElementById("seen").textContent;
  document.body.append(copy);
});
</script>
"""


def troubled() -> ServiceStatus:
    """A status with long and hostile names and with many faults."""
    status = service_status(hostname="definition-server-7c9f8d6b5-x2x4z")
    sync = replace(
        status.sync, last_error=Reason.CATALOGUE_SHRUNK, held_reason=Reason.CATALOGUE_SHRUNK, held_version="cd" * 32,
        held_definitions=1, held_names=("W" * 64, EVIL), rows_held={"code_invalid": 23}, pinned="policy",
        pinned_version="ab" * 32, next_attempt=NOW + 30,
    )  # fmt: skip
    return replace(
        status,
        sync=sync,
        database=DatabaseStatus(
            ("db-with-a-long-name.europe-west.example:5432",) * 3, "avap", "definition_reader", None
        ),
        publications=(PublicationStatus(NOW, "ab" * 32, 189, 1, 2, 3, ("+ " + "W" * 62, f"~ {EVIL}")),) * 3,
        held_commands=(HeldCommandStatus("W" * 64, "code_invalid", NOW), HeldCommandStatus(EVIL, "code_invalid", NOW)),
        workers=tuple(
            WorkerStatus(n, 1, "serving", 3, "ab" * 32, 2, 0.1, 0, False, 9, "free", "full") for n in range(4)
        ),
        keys_last_used={"2026-11": NOW, "W" * 32: 0},
        certificates_expire={"server": NOW + 86_400, "client_authorities": NOW - 1},
    )


def look(tmp_path: Path, width: int, *options: str) -> dict[str, Any]:
    """The results of the probe for the page as a file, without the policy, in a frame of ``width`` pixels.

    (The browser's own window is never narrower than 500.)
    """
    path, page = tmp_path / "page.html", status_page(troubled(), NOW).decode().replace("</body>", PROBE + "</body>")
    frame = f'<iframe width="{width}" height="1000" style="border: 0" srcdoc="{escape(page)}"></iframe>'
    path.write_text(f'<!DOCTYPE html><meta charset="utf-8">{frame}{COPY}', encoding="utf-8")
    shown = chromium(tmp_path, "--dump-dom", *options, path.as_uri())
    found = re.search(r'<pre id="copy">(.*?)</pre>', shown, re.DOTALL)
    assert found
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_exceeds_the_page_and_no_name_runs_as_a_script(tmp_path: Path, width: int) -> None:
    seen = look(tmp_path, width)
    assert width - 20 <= seen["width"] <= width
    assert (seen["overflow"], seen["out"], seen["small"]) == (0, 0, 0)
    assert seen["title"] == "Serving, act now · definition-server-7c9f8d6b5-x2x4z"


def test_the_page_is_light_or_dark_as_the_reader_prefers(tmp_path: Path) -> None:
    light, dark = look(tmp_path, 1280), look(tmp_path, 1280, "--blink-settings=preferredColorScheme=0")
    assert light["page"] != dark["page"]


class Service:
    """A server whose status becomes worse with each reading."""

    def __init__(self) -> None:
        self.readings = 0

    def read(self) -> ServiceStatus:
        self.readings += 1
        return service_status() if self.readings == 1 else troubled()

    def alive(self) -> str | None:
        return None


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    server = AdminServer("127.0.0.1", 0, read=service.read, alive=service.alive)
    server.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.close()


def test_the_page_follows_the_server_under_its_own_policy(tmp_path: Path, service: Service, address: str) -> None:
    shown = chromium(tmp_path, "--dump-dom", address)
    assert service.readings > 1
    assert "<h2>Serving, act now</h2>" in shown
    assert "Live, every 5 s" in shown
    assert "<title>Serving, act now" in shown
    assert EVIL not in shown


def test_without_scripts_the_browser_shows_the_whole_page(tmp_path: Path) -> None:
    page = status_page(troubled(), NOW).decode()
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    # The wait is shorter than the time after which the page is loaded again. A frame with its own process would not be
    # in the picture.
    same_process = "--disable-features=IsolateSandboxedIframes"
    options = ("--virtual-time-budget=3000", "--window-size=1280,2000", same_process, f"--screenshot={picture}")

    def drawn(content: str) -> int:
        frame = f'<iframe sandbox width="1200" height="1900" srcdoc="{escape(content)}"></iframe>'
        path.write_text(f'<!DOCTYPE html><meta charset="utf-8">{frame}', encoding="utf-8")
        chromium(tmp_path, *options, path.as_uri())
        return inked(picture)

    blank = drawn("")
    # On a busy machine the browser may take the picture before it has drawn the frame.
    until(lambda: drawn(page) > 10 * blank, "the page is drawn")


def test_a_page_whose_server_has_ended_shows_that_it_is_old(tmp_path: Path, service: Service) -> None:
    class Ending(Service):
        def read(self) -> ServiceStatus:
            status = super().read()
            if self.readings > 1:
                raise RuntimeError("the test's server fails")
            return status

    failing = Ending()
    server = AdminServer("127.0.0.1", 0, read=failing.read, alive=failing.alive)
    server.start()
    try:
        shown = chromium(tmp_path, "--dump-dom", f"http://127.0.0.1:{server.port}/")
    finally:
        server.close()
    assert "what is shown is old" in shown
    assert "<h2>Serving, up to date</h2>" in shown
