"""Figures for planning a fleet, from measurements."""
