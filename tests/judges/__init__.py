"""Judges from outside: what others wrote, and grpcio itself, say whether our server speaks gRPC over HTTP/2."""
