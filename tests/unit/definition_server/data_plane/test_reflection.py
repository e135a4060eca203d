"""The description of the reflection service, version 1, which is derived from v1alpha's."""

from __future__ import annotations

from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2

from definition_server.data_plane import reflection


def test_fields_and_methods_of_the_v1_service_have_types_of_its_own_package() -> None:
    proto = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(proto)
    reflection._rename(proto)
    types = [field.type_name for message in proto.message_type for field in message.field if field.type_name]
    types += [
        name for each in proto.service for method in each.method for name in (method.input_type, method.output_type)
    ]
    assert len(types) >= 5
    assert {name.rpartition(".")[0] for name in types} == {".grpc.reflection.v1"}
