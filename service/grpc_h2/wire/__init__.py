"""Octets: frames, header compression, and the errors that both have."""
