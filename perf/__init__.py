"""Measurements. Each prints a table and keeps a record in ``perf/results/``."""
