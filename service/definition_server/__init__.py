"""AVAP Definition Server: command definitions over gRPC, served from memory, also while the database is down."""

__version__ = "0.1.0"
