"""The servers that are measured, each on a CPU of its own: our workers and servers of files; their catalogues and
processes."""
