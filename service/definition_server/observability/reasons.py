"""The reasons for failures. The pages of the admin port show only names from this list.

The pages need no key. The text of an error may hold a host, a user, a path, a row's name or, if a library quotes its
input, a secret; so texts of errors are written only to the log. docs/observability.md explains each reason.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """The name of a reason."""

    DATABASE_URL_UNUSABLE = "database_url_unusable"
    DATABASE_UNREACHABLE = "database_unreachable"
    DATABASE_TIMEOUT = "database_timeout"
    DATABASE_REFUSED_LOGIN = "database_refused_login"
    DATABASE_CONNECTION_LOST = "database_connection_lost"
    DATABASE_ERROR = "database_error"
    STATEMENT_TIMEOUT = "statement_timeout"
    TABLE_MISSING = "table_missing"
    COLUMN_MISSING = "column_missing"
    TABLE_LOCKED = "table_locked"
    PERMISSION_DENIED = "permission_denied"
    ROWS_HIDDEN = "rows_hidden"
    TABLE_EMPTY = "table_empty"
    CATALOGUE_SHRUNK = "catalogue_shrunk"
    CATALOGUE_GROWN = "catalogue_grown"
    CATALOGUE_CHANGED = "catalogue_changed"
    TOO_MANY_ROWS_HELD = "too_many_rows_held"
    CATALOGUE_TOO_LARGE = "catalogue_too_large"
    MACHINE_LIMIT = "machine_limit"
    DISK_FAILED = "disk_failed"
    DISK_HANGS = "disk_hangs"
    SNAPSHOT_UNUSABLE = "snapshot_unusable"
    INTERNAL_ERROR = "internal_error"


HOLDING = (
    Reason.TABLE_EMPTY,
    Reason.CATALOGUE_SHRUNK,
    Reason.CATALOGUE_GROWN,
    Reason.CATALOGUE_CHANGED,
    Reason.TOO_MANY_ROWS_HELD,
)
"""The reasons why a catalogue is held."""
