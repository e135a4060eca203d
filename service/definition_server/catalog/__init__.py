"""Definitions, and the immutable snapshot of them. Nothing here uses a process, a socket or a database.

Theory of operation: *the snapshot is the wire*. `builder.SnapshotBuilder` turns rows into one block of octets whose
body is a serialized ``avap.CatalogResponse``; `snapshot.Snapshot` reads that block without copying it. The block in
shared memory, the last-known-good file and the answer to ``SyncCatalog`` are the same octets, and an answer to
``GetCommand`` is a slice of them, so nothing is encoded while a request waits.
"""
