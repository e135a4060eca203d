"""What master and workers share: control messages, descriptor passing, sealed memory, the stats page."""
