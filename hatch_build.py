"""What a build takes from its environment: the project's public address, `PROJECT_URL`, for the links of an index."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAGES = {
    "Homepage": "", "Source": "", "Documentation": "/blob/HEAD/docs/README.md", "Changelog": "/blob/HEAD/CHANGELOG.md",
    "Security": "/blob/HEAD/SECURITY.md",
}  # fmt: skip
"""Name of a link → path below the address of the repository."""

_LINK = re.compile(r"(!?)(\[[^\]\[]*\])\((?!https?:|mailto:|#)([^)\s]+)\)")


class ProjectUrls(MetadataHookInterface):
    """Fills ``project.urls`` and the README. Without the variable there are no links of the project, and those of the
    README stay relative: whoever publishes the wheel knows its address.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the links and the README to ``metadata``.

        Raises:
            ValueError: if the variable is not an address of a web page.
        """
        address = os.environ.get("PROJECT_URL", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if address:
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise ValueError(f"PROJECT_URL is {address!r}: set it to the address of the repository, https://…")
            metadata["urls"] = {name: address + path for name, path in PAGES.items()}
            text = with_absolute_links(text, address)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(text: str, address: str) -> str:
    """``text`` in Markdown with links to files of the repository at ``address``, for a reader who has only the text.

    A picture needs the file itself (``raw``), a page the view of it (``blob``).
    """
    return _LINK.sub(
        lambda found: f"{found[1]}{found[2]}({address}/{'raw' if found[1] else 'blob'}/HEAD/{found[3]})", text
    )
