"""Code generated from ``proto/`` by ``nox -s proto``. Do not edit the ``*_pb2*`` files."""
