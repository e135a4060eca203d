"""The jail of a worker (Landlock, seccomp): the kernel refuses certain actions, whatever code runs in the worker."""
