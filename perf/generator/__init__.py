"""The load generator: makes the calls of a scenario, checks every answer, counts latencies in histograms."""
