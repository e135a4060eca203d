"""Measurements: ``python -m perf --help``. Each command prints its figures; records are kept in ``perf/results/``.

A room imports only rooms below it (``tests/unit/test_layers.py``)::

    commands
    planning/                  what a fleet needs, from records and models
    benches/     report/       measurements outside the gates; records as pages and tables
    harness/                   rounds, gates, verdicts
    generator/   peers/        the load; servers on other gRPC stacks
    targets/                   a worker or nghttpd, its catalogue, its processes

What ``perf`` and the tests share (frames, attacks, builds, servers, PostgreSQL) is in ``tests/support``.
"""
