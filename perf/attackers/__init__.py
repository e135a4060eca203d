"""Clients that attack a server, each kind in its own process: see `perf.attackers.process`."""
