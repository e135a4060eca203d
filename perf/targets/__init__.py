"""The servers that are measured: one of our workers or nghttpd, on its own CPU, with its catalogue and processes."""
