"""Simulations. One seed decides everything outside the code under test, so that a failing seed can be replayed."""
