"""The programs and schemas that check the manifests, in pinned versions, fetched with Go.

They are stored with the judges' programs (`tests.judges.tools`). Without Go the tests that need them are skipped, and
fail in CI.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.judges.tools import CACHE, command
from tests.support.builds import BuildFailed, built, make, run

HERE = Path(__file__).parent
KUBERNETES = HERE.parents[1] / "deploy/kubernetes"
OPERATOR = "github.com/prometheus-operator/prometheus-operator"
SERVICE_MONITOR = "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml"
FETCH_SECONDS = 600
RENDER_SECONDS = 60


def kustomize() -> Path:
    """The kustomize that ``go/go.mod`` names, built once."""
    go = command("go", "Go 1.26")

    def build(out: Path) -> None:
        make([go, "build", "-buildvcs=false", "-o", f"{out}/", "tool"], HERE / "go")

    return _built(HERE / "go", build) / "kustomize"


def service_monitor_schema() -> dict[str, Any]:
    """The schema of ``ServiceMonitor`` v1, from the module of the operator that ``crd/go.mod`` names."""
    go = command("go", "Go 1.26")

    def fetch(out: Path) -> None:
        done = run([go, "mod", "download", "-json", OPERATOR], seconds=FETCH_SECONDS, cwd=HERE / "crd")
        if done.returncode:
            raise BuildFailed(f"go mod download {OPERATOR}:\n{done.stdout}{done.stderr}")
        shutil.copy(Path(json.loads(done.stdout)["Dir"]) / SERVICE_MONITOR, out / "crd.yaml")

    crd = yaml.safe_load((_built(HERE / "crd", fetch) / "crd.yaml").read_text(encoding="utf-8"))
    schema: dict[str, Any] = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    return schema


def render(folder: Path) -> list[dict[str, Any]]:
    """The objects that kustomize makes of a folder.

    Raises: AssertionError: kustomize fails; the message has its output.
    """
    done = subprocess.run(
        [kustomize(), "build", folder], capture_output=True, text=True, timeout=RENDER_SECONDS, check=False
    )
    assert done.returncode == 0, f"kustomize build {folder}:\n{done.stderr}"
    assert not done.stderr, f"kustomize warns of {folder}:\n{done.stderr}"
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def _built(source: Path, build: Any) -> Path:
    try:
        return built(source, CACHE, build)
    except BuildFailed as error:
        pytest.fail(str(error), pytrace=False)
