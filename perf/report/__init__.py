"""Shows records: a page with charts, and the tables of the README."""
