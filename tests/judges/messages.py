"""Message classes of ``proto/grpc/testing/test.proto``, compiled on demand and not stored in a file."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

PROTO = Path(__file__).parent / "proto"
PACKAGE = "grpc.testing"
SERVICE = f"{PACKAGE}.TestService"


@functools.cache
def message_class(name: str) -> Any:
    """The class of message ``grpc.testing.<name>``."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    # The classes have their own pool, because other packages may register the official files in the default pool.
    pool = descriptor_pool.DescriptorPool()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "descriptors"
        if protoc.main(["protoc", f"-I{PROTO}", f"--descriptor_set_out={out}", "grpc/testing/test.proto"]):
            raise RuntimeError("test.proto does not compile")
        for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
            pool.Add(file)
    return pool
