"""Communication between master and workers: control messages, descriptor passing, sealed memory, the stats page."""
