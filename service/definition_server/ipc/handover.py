"""Time limits of a snapshot swap, which the master and its workers share.

The process that releases a snapshot last frees its memory: 10 to 15 ms for 200 MB, during which a worker would answer
no call. So the master holds a replaced snapshot until every worker has released it. A worker prepares its answers for
`PREPARATION_SECONDS` at most, swaps, and releases the old snapshot `RELEASE_SECONDS` later.
"""

from __future__ import annotations

PREPARATION_SECONDS = 1.0
"""The most seconds for the preparation of answers before a swap. A busy worker makes little progress with the
preparation, and must not serve old rows for long because of it."""

RELEASE_SECONDS = 0.5
"""Seconds from the swap until a worker releases the old snapshot. Calls that still use the old snapshot have ended by
then."""

HOLD_SECONDS = 2.0
"""Seconds from the publication until the master releases the old snapshot."""

assert PREPARATION_SECONDS + RELEASE_SECONDS < HOLD_SECONDS, "the master must release a snapshot after its workers"
