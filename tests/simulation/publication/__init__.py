"""Simulation of publication: the master's own code in virtual time, between a database, disk and workers that fail.

What is real: `SyncLoop`, `Synchronizer` with gate, guard, history, wishes and publisher, `Publications`, the
supervisor, snapshots in sealed memory and the files of SNAPSHOT_DIR. Simulated are time, the database, when and
whether the disk answers, the process that judges rows, and the worker processes. One seed decides everything (`world`),
and `promises` says what must hold after every step.
"""
