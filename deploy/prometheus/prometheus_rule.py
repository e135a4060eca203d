"""Writes the rules as an object of the Prometheus operator: ``python deploy/prometheus/prometheus_rule.py``.

The object is made from the files of ``rules/`` and kept beside the other components, so that using it needs no Python.
A test fails where the two differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "kubernetes/components/prometheus-rule/prometheus-rule.yaml"
HEAD = "# Written by deploy/prometheus/prometheus_rule.py from the files of deploy/prometheus/rules. Change those.\n"


def build() -> str:
    """The object as YAML text."""
    groups: list[Any] = []
    for path in sorted((HERE / "rules").glob("*.yml")):
        groups += yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    labels = {"app.kubernetes.io/name": "definition-server", "app.kubernetes.io/part-of": "avap"}
    made = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "definition-server", "namespace": "avap", "labels": labels},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=110)


if __name__ == "__main__":
    OUTPUT.write_text(build(), encoding="utf-8")
