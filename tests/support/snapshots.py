"""Functions that make rows, snapshots and publications."""

from __future__ import annotations

from collections.abc import Iterable

from definition_server.catalog.builder import BuiltSnapshot, SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.publisher import Publication, to_shared_memory


def row(name: str, code: str = "pass", *, id: int = 1) -> Row:  # noqa: A002 - the column's name
    """A plausible row."""
    return Row(id, name.encode(), b"function", b"[]", code.encode())


def built(
    *rows: Row | str, generation: int = 1, created_at: float = 1_700_000_000.0, signer: Signer | None = None
) -> BuiltSnapshot:
    """The snapshot of ``rows``; a string stands for a plausible row of that name."""
    builder = SnapshotBuilder(signer)
    builder.add(_rows(rows))
    return builder.build(generation=generation, created_at_ns=int(created_at * 1e9))


def opened(*rows: Row | str, generation: int = 1) -> Snapshot:
    """The snapshot of ``rows``, opened in a bytes object."""
    return Snapshot(built(*rows, generation=generation).to_bytes())


def published(
    *rows: Row | str, generation: int = 1, created_at: float = 1_700_000_000.0, signer: Signer | None = None
) -> Publication:
    """The snapshot of ``rows`` in sealed memory. The caller closes the descriptor, or passes it to a `Publisher`."""
    return to_shared_memory(built(*rows, generation=generation, created_at=created_at, signer=signer))


def _rows(rows: Iterable[Row | str]) -> Iterable[Row]:
    return (row(item) if isinstance(item, str) else item for item in rows)
