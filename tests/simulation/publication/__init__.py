"""Simulation of publication: the master's own code in virtual time, between a database, disk and workers that fail.

Real are `SyncLoop`, `Synchronizer` with gate, guard, history, wishes and publisher, `Publications`, the supervisor,
snapshots in sealed memory and the files of SNAPSHOT_DIR. Time, the database, the answers of the disk, the process that
judges rows and the worker processes are simulated. One seed decides everything (`world`), and `promises` checks what
must hold after every step.
"""
