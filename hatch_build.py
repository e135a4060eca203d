"""What a build takes from its environment: the project's public address, `PROJECT_URL`, for the links of an index."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAGES = {
    "Homepage": "", "Source": "", "Documentation": "/blob/HEAD/docs/README.md", "Changelog": "/blob/HEAD/CHANGELOG.md",
    "Security": "/blob/HEAD/SECURITY.md",
}  # fmt: skip
"""Name of a link → path below the address of the repository."""


class ProjectUrls(MetadataHookInterface):
    """Fills ``project.urls``. Without the variable there are none: whoever publishes the wheel knows its address."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the links to ``metadata``.

        Raises:
            ValueError: if the variable is not an address of a web page.
        """
        address = os.environ.get("PROJECT_URL", "").rstrip("/")
        if not address:
            return
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"PROJECT_URL is {address!r}: set it to the address of the repository, https://…")
        metadata["urls"] = {name: address + path for name, path in PAGES.items()}
