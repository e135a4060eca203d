"""What is measured: one of our workers, or a server of files, on a CPU of its own; its catalogue and processes."""
