"""AVAP Definition Server: command definitions over gRPC, served from memory, whatever happens to the database."""

__version__ = "0.1.0"
