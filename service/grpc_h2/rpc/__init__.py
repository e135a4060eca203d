"""The gRPC layer: requests, messages, responses."""
