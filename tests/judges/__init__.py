"""Judges from outside: programs of other projects, and grpcio itself, check that our server speaks gRPC over HTTP/2."""
