"""What is measured: a worker of ours or nghttpd, on a CPU of its own, its catalogue and its processes."""
