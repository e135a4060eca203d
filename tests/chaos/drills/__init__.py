"""Drills: steady load on all workers, one fault, and promises that must hold.

``model``      the classes of faults, allowances, stages and outcomes
``rows``       a table whose every row carries the version that was written
``answers``    the answers that are right
``load``       the load, in a process of its own (``load_process``)
``usage``      memory, descriptors and threads of the server's processes
``stage``      sets up database, table, proxy and server
``reader``     the role that a server reads with, and its password
``standby``    a standby that lags behind
``run``        ``play(fault, stage)`` → outcome
``judge``      outcome → broken promises
``catalogue``  every fault that can be rehearsed
``table``      outcomes as a text table and as JSON
"""
