"""Definitions and the immutable snapshot of them. No process, no socket, no database.

Theory of operation: *the snapshot is the wire*. `builder.SnapshotBuilder` turns rows into one block of bytes whose
body is a serialized ``avap.CatalogResponse``; `snapshot.Snapshot` reads it where it lies. The block in shared memory,
the last-known-good file and the answer to ``SyncCatalog`` are the same bytes, and an answer to ``GetCommand`` is a
slice of them, so nothing is encoded while a request waits.
"""
