"""Records shown: a page with charts, and the tables of the README."""
