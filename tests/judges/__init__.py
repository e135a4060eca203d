"""Judges from outside: programs of others, and grpcio itself, check that our server speaks gRPC over HTTP/2."""
