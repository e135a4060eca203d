"""gRPC over HTTP/2 in pure Python: a sans-IO connection, and a thin asyncio shell around it. Knows nothing of AVAP."""
