"""Logs a publication: the findings about its rows, and the differences from the previous publication."""

from __future__ import annotations

from collections.abc import Iterable

from definition_server.catalog.snapshot import Snapshot, diff
from definition_server.catalog.validation import LARGE_DEFINITION, Findings
from definition_server.control_plane.sync_state import ChangeCounts
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

_NAMES_LOGGED = 10


def log_findings(findings: Findings, snapshot: Snapshot) -> None:
    """Log the rows that are not served and those that look wrong. Log also if some clients cannot receive the
    catalogue.
    """
    for reason, count in findings.unserved.items():
        log.warning("Rows not served", reason=reason, count=count, examples=findings.examples[reason])
    for suspect, count in findings.suspect.items():
        log.warning(
            "Rows look wrong, served as they are",
            reason=suspect,
            count=count,
            examples=findings.examples[suspect],
        )
    if len(snapshot.body) > LARGE_DEFINITION:
        log.warning(
            "The catalogue passes 4 MiB; SyncCatalog reaches only clients that raise their receive limit",
            bytes=len(snapshot.body),
            remedy="set grpc.max_receive_message_length (or its like) in the clients",
        )


def log_broadcast(
    previous: Snapshot | None, snapshot: Snapshot, duration: float, may_differ: Iterable[bytes] | None
) -> ChangeCounts:
    """Log the publication of ``snapshot`` after ``duration`` seconds. Compares it with ``previous``: the commands that
    ``may_differ`` names, or all commands if it is None.

    Returns:
        What was changed.
    """
    changes: dict[str, object] = {"added": snapshot.count, "removed": 0, "changed": 0}
    numbers = (snapshot.count, 0, 0)
    examples: list[str] = []
    if previous is not None:
        difference = diff(previous, snapshot, may_differ)
        numbers = (len(difference.added), len(difference.removed), len(difference.changed))
        for kind, sign in (("added", "+"), ("removed", "-"), ("changed", "~")):
            names = getattr(difference, kind)
            changes[kind] = len(names)
            if names:
                changes[f"{kind}_names"] = names[:_NAMES_LOGGED]
                examples += [f"{sign} {name}" for name in names[:_NAMES_LOGGED]]
    log.info(
        "Definitions Broadcasted",
        count=snapshot.count,
        duration_ms=round(duration * 1000, 1),
        generation=snapshot.generation,
        version_hash=snapshot.version_hash,
        bytes=snapshot.size,
        **changes,
    )
    return ChangeCounts(*numbers, tuple(examples), snapshot.generation)
