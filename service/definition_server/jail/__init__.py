"""The jail of a worker: what the kernel refuses to it, whatever code runs in it (Landlock, seccomp)."""
