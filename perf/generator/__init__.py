"""The load generator: scenarios become calls, every answer is compared, latencies become histograms."""
