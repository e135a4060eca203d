"""Independent judges: programs of other projects, and grpcio itself, check that the server speaks gRPC over HTTP/2."""
