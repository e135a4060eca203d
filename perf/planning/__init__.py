"""Figures for planning a fleet, from what was measured."""
