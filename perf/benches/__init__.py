"""Measurements that no gate judges; each answers one question."""
