"""The hand-written protobuf encoding equals protobuf: the official runtime writes the same octets and reads the same
values, and any octets yield values or `WireError`.
"""

from __future__ import annotations

import pytest
from google.protobuf.wrappers_pb2 import BytesValue, UInt64Value
from hypothesis import example, given
from hypothesis import strategies as st

from definition_server.catalog import wire
from definition_server.catalog.definition import content_fields, parse_definition
from definition_server.rpc import avap_pb2

# Every value at which a varint becomes an octet longer, and its two neighbours.
EDGES = sorted({max(0, (1 << 7 * n) + d) for n in range(1, 10) for d in (-1, 0, 1)} | {0, 1, 2**64 - 1})

UNSIGNED = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**64 - 1))

TEXT = st.text()  # no surrogates, because protobuf refuses them, too
COMMAND = st.builds(avap_pb2.CommandResponse, name=TEXT, type=TEXT, interface_json=TEXT, code=st.binary(), hash=TEXT)
CATALOGUE = st.builds(
    avap_pb2.CatalogResponse,
    commands=st.lists(COMMAND, max_size=5),
    total_count=st.integers(0, 2**31 - 1),
    version_hash=TEXT,
)


@given(UNSIGNED)
def test_a_varint_equals_that_of_protobuf(value: int) -> None:
    # The varint is the value of a field, after its tag. Protobuf omits the field if the value is zero.
    expected = UInt64Value(value=value).SerializeToString()[1:] if value else b"\0"
    assert wire.varint(value) == expected


def test_varints_are_remembered_when_they_are_first_used_and_up_to_a_limit() -> None:
    varints = type(wire.VARINTS)()
    assert not varints
    for value in EDGES:
        assert varints[value] == wire.varint(value)
    assert varints.keys() == {value for value in EDGES if value < 1 << 14}


@given(st.lists(st.one_of(st.sampled_from([edge for edge in EDGES if edge]), st.integers(1, 2**31))))
def test_content_lengths_are_found_from_the_sizes_of_fields(lengths: list[int]) -> None:
    sizes = [1 + len(wire.varint(length)) + length for length in lengths]
    assert wire.content_lengths(sizes) == lengths


@given(UNSIGNED, st.binary(max_size=3), st.binary(max_size=3))
def test_a_varint_is_read_back_at_any_position(value: int, before: bytes, after: bytes) -> None:
    encoded = wire.varint(value)
    for buffer in (before + encoded + after, memoryview(before + encoded + after)):
        assert wire.read_varint(buffer, len(before)) == (value, len(before) + len(encoded))


@given(UNSIGNED)
def test_a_varint_that_is_cut_short_is_refused(value: int) -> None:
    encoded = wire.varint(value)
    for end in range(len(encoded)):
        with pytest.raises(wire.WireError):
            wire.read_varint(encoded[:end], 0)


def test_a_varint_of_more_than_ten_octets_is_refused() -> None:
    assert wire.read_varint(b"\x80" * 9 + b"\x00", 0) == (0, 10)
    with pytest.raises(wire.WireError):
        wire.read_varint(b"\x80" * 10 + b"\x00", 0)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16383, 16384, 100_000])
def test_a_field_equals_that_of_protobuf(length: int) -> None:
    value = b"x" * length
    assert wire.field(1, value) == BytesValue(value=value).SerializeToString()
    for number, name in ((wire.CODE, "code"), (wire.NAME, "name"), (wire.HASH, "hash")):
        message = avap_pb2.CommandResponse(**{name: value if name == "code" else value.decode()})
        assert wire.field(number, value) == message.SerializeToString()


@given(name=TEXT.filter(bool), kind=TEXT.filter(bool), interface=TEXT.filter(bool), code=st.binary(max_size=300))
@example(name="n", kind="k", interface="[]", code=b"")
@example(name="n" * 200, kind="k" * 20_000, interface="[]", code=b"c" * 70_000)
def test_the_content_of_a_definition_equals_that_of_protobuf(name: str, kind: str, interface: str, code: bytes) -> None:
    message = avap_pb2.CommandResponse(name=name, type=kind, interface_json=interface, code=code)
    assert content_fields(name.encode(), kind.encode(), interface.encode(), code) == message.SerializeToString()


def test_the_field_numbers_are_those_of_the_contract() -> None:
    command = avap_pb2.CommandResponse.DESCRIPTOR.fields_by_name
    assert {name: field.number for name, field in command.items()} == {
        "name": wire.NAME,
        "type": wire.TYPE,
        "interface_json": wire.INTERFACE_JSON,
        "code": wire.CODE,
        "hash": wire.HASH,
        "internal_id": wire.INTERNAL_ID,
        "avbc_code": wire.AVBC_CODE,
        "avbc_version": wire.AVBC_VERSION,
    }
    catalogue = avap_pb2.CatalogResponse.DESCRIPTOR.fields_by_name
    assert {name: field.number for name, field in catalogue.items()} == {
        "commands": wire.COMMANDS,
        "total_count": wire.TOTAL_COUNT,
        "version_hash": wire.VERSION_HASH,
    }
    assert avap_pb2.CommandRequest.DESCRIPTOR.fields_by_name["name"].number == wire.NAME


@given(CATALOGUE)
def test_the_fields_of_a_catalogue_are_read_in_order_and_uncopied(catalogue: avap_pb2.CatalogResponse) -> None:
    encoded = catalogue.SerializeToString()
    found = list(wire.fields(memoryview(encoded)))
    expected = [(wire.COMMANDS, 0, command.SerializeToString()) for command in catalogue.commands]
    if catalogue.total_count:
        expected.append((wire.TOTAL_COUNT, catalogue.total_count, b""))
    if catalogue.version_hash:
        expected.append((wire.VERSION_HASH, 0, catalogue.version_hash.encode()))
    assert [(number, value, bytes(content)) for number, value, content in found] == expected
    assert all(content.obj is encoded for _, _, content in found)


@given(COMMAND)
def test_a_definition_is_parsed_as_protobuf_parses_it(command: avap_pb2.CommandResponse) -> None:
    definition = parse_definition(memoryview(command.SerializeToString()))
    assert definition.name == command.name
    assert definition.type == command.type
    assert definition.interface_json == command.interface_json
    assert definition.code == command.code
    assert definition.hash == command.hash


@given(COMMAND, COMMAND)
def test_the_last_value_of_a_repeated_field_is_used(
    first: avap_pb2.CommandResponse, second: avap_pb2.CommandResponse
) -> None:
    encoded = first.SerializeToString() + second.SerializeToString()
    merged = avap_pb2.CommandResponse.FromString(encoded)
    assert parse_definition(memoryview(encoded)).code == merged.code
    assert parse_definition(memoryview(encoded)).name == merged.name


@given(CATALOGUE.filter(lambda catalogue: catalogue.ByteSize()), st.data())
def test_a_cut_message_is_refused_or_ends_between_two_fields(
    catalogue: avap_pb2.CatalogResponse, data: st.DataObject
) -> None:
    encoded = catalogue.SerializeToString()
    whole = list(wire.fields(memoryview(encoded)))
    cut = memoryview(encoded)[: data.draw(st.integers(0, len(encoded) - 1))]
    read = []
    try:
        read += list(wire.fields(cut))
    except wire.WireError:
        return
    assert read == whole[: len(read)]
    assert len(read) < len(whole)


@given(st.binary(max_size=60))
@example(b"\x0b")  # a group
@example(b"\x0d1234")  # 32 bits
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f")  # a length above every buffer
@example(b"\x0a\x01\xff")  # a name that is not UTF-8
def test_any_bytes_give_a_definition_or_a_wire_error(octets: bytes) -> None:
    try:
        definition = parse_definition(memoryview(octets))
    except wire.WireError:
        return
    assert isinstance(definition.name, str)
    assert isinstance(definition.code, bytes)


@pytest.mark.parametrize("wire_type", [1, 3, 4, 5, 6, 7])
def test_wire_types_that_no_catalogue_uses_are_refused(wire_type: int) -> None:
    with pytest.raises(wire.WireError, match=f"wire type {wire_type}"):
        list(wire.fields(memoryview(bytes([1 << 3 | wire_type]) + bytes(16))))


def test_a_length_beyond_the_buffer_is_refused() -> None:
    assert [bytes(content) for _, _, content in wire.fields(memoryview(b"\x0a\x02ab"))] == [b"ab"]
    with pytest.raises(wire.WireError, match="past the end"):
        list(wire.fields(memoryview(b"\x0a\x03ab")))


@pytest.mark.parametrize("number", [wire.NAME, wire.TYPE, wire.INTERFACE_JSON, wire.HASH])
def test_a_string_that_is_not_utf_8_is_refused(number: int) -> None:
    with pytest.raises(wire.WireError, match="UTF-8"):
        parse_definition(memoryview(wire.field(number, b"\xff")))
    assert parse_definition(memoryview(wire.field(wire.CODE, b"\xff"))).code == b"\xff"


def test_the_largest_message_is_that_of_protobuf() -> None:
    assert wire.MAX_MESSAGE == 2_147_483_647
