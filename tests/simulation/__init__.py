"""Simulations: one seed decides everything that is outside of the code under test, so that a failing seed replays."""
