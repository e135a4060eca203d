"""The warnings of a start: settings that are allowed, but probably not intended."""

from __future__ import annotations

from definition_server.environment import notices
from definition_server.observability.logs import get_logger
from definition_server.settings import Settings

log = get_logger(__name__)

NOT_STORED = "a start needs the database, there is no history to pin a version of, and a pin ends with the server"
"""The effects of a missing ``SNAPSHOT_DIR``."""


def log_notices(settings: Settings, *, lasting: bool) -> None:
    """Log each warning once.

    Args:
        settings: The valid settings.
        lasting: Whether the server is meant to run for long. If so, a missing key or directory causes a warning too.
    """
    for notice in notices(Settings):
        log.warning("An environment variable may be wrong", variable=notice.variable, reason=notice.text)
    if lasting and settings.avap_internal_key is None:
        log.warning(
            "Code is served unsigned: AVAP_INTERNAL_KEY is not set",
            effect='the AVAP language server accepts no command at all; it reports a "wrong magic number"',
            remedy="set AVAP_INTERNAL_KEY to the key that language servers verify with",
        )
    if lasting and settings.snapshot_dir is None:
        log.warning(
            "Nothing is stored: SNAPSHOT_DIR is not set",
            effect=NOT_STORED,
            remedy="set SNAPSHOT_DIR to a directory that outlives a restart",
        )
