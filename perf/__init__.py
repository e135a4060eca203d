"""Measurements: ``python -m perf --help``. Each command prints its figures; records are stored in ``perf/results/``.

A package imports only packages below it in this list (``tests/unit/test_layers.py``)::

    commands
    planning/                  the needs of a fleet, from records and models
    benches/     report/       measurements outside the gates; records as pages and tables
    harness/                   rounds, gates, verdicts
    generator/   attackers/    the load and the victim; clients that attack
    peers/                     servers on other gRPC stacks; our compiled engine
    targets/                   a worker or a server of files, its catalogue, its processes

``tests/support`` holds the code that ``perf`` and the tests share: frames, attacks, builds, servers, PostgreSQL.
"""
