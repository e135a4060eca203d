"""One connection, without a socket, an event loop, a clock or randomness of its own."""
