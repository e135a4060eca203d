"""The operator's commands, as processes, in the environment that `kubectl exec` gives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(*arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``definition-server`` with ``directory`` as SNAPSHOT_DIR."""
    return subprocess.run(
        [sys.executable, "-m", "definition_server", *arguments],
        env={"PATH": os.environ["PATH"], "SNAPSHOT_DIR": str(directory), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def answer(*arguments: str, directory: Path) -> Any:
    """The JSON that the command prints; it must succeed."""
    done = run(*arguments, "--json", directory=directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
