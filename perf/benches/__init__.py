"""Measurements with a question of their own, each outside the gates."""
