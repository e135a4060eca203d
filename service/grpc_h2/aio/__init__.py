"""asyncio around a connection: server, listener, protocol, scheduler, calls."""
