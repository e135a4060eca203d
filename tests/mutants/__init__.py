"""Measures the tests: small faults are put into the code, one at a time, and the tests must detect each of them.

``nox -s mutants -- --sample 200 --seed 1`` draws faults at random, equally many in each room of `rooms.ROOMS`.
cosmic-ray (https://cosmic-ray.readthedocs.io) makes the faults; `operators` has the two kinds that it lacks: deleted
statements and changed return values. The tests run in a copy of the project, so the working tree stays as it is.
"""
