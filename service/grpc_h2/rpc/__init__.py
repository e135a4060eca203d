"""What gRPC means by them: requests, messages, responses."""
