"""Octets: frames, header compression, and the errors of both."""
