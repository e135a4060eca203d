"""A real Prometheus that scrapes a test's servers and evaluates the shipped rules: Debian's package ``prometheus``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from tests.support.polling import until

from definition_server.cli.embedded_postgres import free_port

SHIPPED = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = sorted((SHIPPED / "rules").glob("*.yml"))
SCRAPE = "250ms"
STOP_SECONDS = 15

Document = dict[str, Any]
Rewrite = Callable[[Document], Document]


def program(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``. If it is missing, the test fails in CI and is skipped elsewhere."""
    found = shutil.which(name)
    if found is None:
        told = f"{name} is missing (Debian package prometheus)"
        if os.environ.get("CI"):
            pytest.fail(told, pytrace=False)
        pytest.skip(told)
    return found


def shipped_rules() -> list[Document]:
    """Every alerting and recording rule, as written."""
    documents = [yaml.safe_load(path.read_text()) for path in RULES]
    return [rule for document in documents for group in document["groups"] for rule in group["rules"]]


def shipped_alerts() -> dict[str, Document]:
    """The alerts by name."""
    return {rule["alert"]: rule for rule in shipped_rules() if "alert" in rule}


def selectors(expression: str) -> set[str]:
    """The series that a PromQL expression uses, each as a selector with its matchers."""
    found = set()
    # Label lists (`by (job, status)`, `on (job)`) hold names of labels, not of metrics.
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", expression)
    for name, matchers in re.findall(r"([a-z][\w:]*)\s*(\{[^}]*\})?(?!\s*\()", bare):
        if name.startswith(("avap_", "process_", "python_")) or ":" in name or name == "up":
            found.add(name + matchers)
    return found


class Prometheus:
    """A server with its own data directory and port. A context: it leaves nothing behind."""

    def __init__(self, directory: Path, targets: Sequence[int], rewrite: Rewrite = lambda rules: rules) -> None:
        """``targets``: ports on 127.0.0.1 with ``/metrics``. ``rewrite``: changes a document of rules before use."""
        self._program = program("prometheus")
        self._directory = directory
        self._log = directory / "prometheus.log"
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        rules = directory / "rules"
        rules.mkdir()
        for path in RULES:
            document = rewrite(yaml.safe_load(path.read_text()))
            for group in document["groups"]:
                group["interval"] = SCRAPE
            (rules / path.name).write_text(yaml.safe_dump(document))
        (directory / "prometheus.yml").write_text(yaml.safe_dump(_configuration(targets)))

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    f"--config.file={self._directory}/prometheus.yml",
                    f"--storage.tsdb.path={self._directory}/data",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            until(self._ready, self._tail)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        process = self._process
        assert process is not None
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"Prometheus did not end:\n{self._tail()}") from None

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._tail()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    # -- queries -----------------------------------------------------------------------------------------------

    def api(self, path: str, parameters: Mapping[str, str] | None = None) -> Any:
        """``data`` of an answer of ``/api/v1/``.

        Raises:
            AssertionError: if Prometheus refuses the query; with its reason.
        """
        query = urllib.parse.urlencode(parameters or {})
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[Document]:
        """Series at this moment: ``metric`` (labels) and ``value`` (time, text)."""
        data = self.api("query", {"query": expression})
        assert data["resultType"] == "vector", (expression, data["resultType"])
        series: list[Document] = data["result"]
        return series

    def wait_series(self, expression: str, seconds: float = 30) -> list[Document]:
        """Wait until there are series, and return them."""
        return until(lambda: self.query(expression), f"a series {expression}", seconds=seconds)

    def query_range(self, expression: str, seconds: float = 5, step: float = 0.5) -> list[Document]:
        """Series over the last seconds: ``metric`` and ``values``."""
        now = float(self.api("query", {"query": "time()"})["result"][1])
        parameters = {"query": expression, "start": f"{now - seconds}", "end": f"{now}", "step": f"{step}"}
        data = self.api("query_range", parameters)
        assert data["resultType"] == "matrix", (expression, data["resultType"])
        series: list[Document] = data["result"]
        return series

    def alerts(self, state: str = "firing") -> dict[str, Document]:
        """Alerts in that state by name; one of each, if there are several instances."""
        return {
            alert["labels"]["alertname"]: alert for alert in self.api("alerts")["alerts"] if alert["state"] == state
        }

    def rules(self) -> list[Document]:
        """Every rule with its ``health`` and ``lastError``."""
        return [rule for group in self.api("rules")["groups"] for rule in group["rules"]]

    def wait_firing(self, name: str, seconds: float = 30) -> Document:
        """Wait until the alert fires, and return it."""
        until(lambda: name in self.alerts(), lambda: f"{name} firing; it is {sorted(self.alerts())}", seconds=seconds)
        return self.alerts()[name]

    def wait_quiet(self, expression: str) -> None:
        """Wait until there is such a series and no alert fires. (`absent` alerts fire before the first scrape.)"""
        self.wait_series(expression)
        until(lambda: self.alerts() == {}, lambda: f"no alert; it is {sorted(self.alerts())}")

    def wait_resolved(self, name: str, seconds: float = 30) -> None:
        """Wait until the alert no longer fires."""
        until(lambda: name not in self.alerts(), f"{name} resolved", seconds=seconds)


def _configuration(targets: Sequence[int]) -> Document:
    """The shipped configuration, with targets on this machine and short intervals."""
    shipped: Document = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    shipped["global"] |= {"scrape_interval": SCRAPE, "evaluation_interval": SCRAPE, "scrape_timeout": SCRAPE}
    (job,) = shipped["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in targets]}]
    return shipped
