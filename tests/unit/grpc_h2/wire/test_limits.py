"""States the numbers of HTTP/2 and HPACK and the limits of parsing. Other tests import them, so they would accept any
value.

The module of each value gives the reason for it. A changed value must be changed here, too.
"""

from __future__ import annotations

from tests.support.stated import deviations

KIB, MIB = 1024, 1024 * 1024

STATED: dict[str, dict[str, object]] = {
    "errors": {
        "ErrorCode.NO_ERROR": 0,
        "ErrorCode.PROTOCOL_ERROR": 1,
        "ErrorCode.INTERNAL_ERROR": 2,
        "ErrorCode.FLOW_CONTROL_ERROR": 3,
        "ErrorCode.SETTINGS_TIMEOUT": 4,
        "ErrorCode.STREAM_CLOSED": 5,
        "ErrorCode.FRAME_SIZE_ERROR": 6,
        "ErrorCode.REFUSED_STREAM": 7,
        "ErrorCode.CANCEL": 8,
        "ErrorCode.COMPRESSION_ERROR": 9,
        "ErrorCode.CONNECT_ERROR": 10,
        "ErrorCode.ENHANCE_YOUR_CALM": 11,
        "ErrorCode.INADEQUATE_SECURITY": 12,
        "ErrorCode.HTTP_1_1_REQUIRED": 13,
    },
    "frame_parsing": {"LONGEST_SHORT_BLOCK": 384, "_LONGEST_SHORT_DATA": 512, "_FIXED_LENGTHS": {3: 4, 6: 8, 8: 4}},
    "frames": {
        "END_STREAM": 1,
        "ACK": 1,
        "END_HEADERS": 4,
        "PADDED": 8,
        "PRIORITY_FIELDS": 32,
        "HEADER_LENGTH": 9,
        "DEFAULT_FRAME_SIZE": 16 * KIB,
        "LARGEST_FRAME_SIZE": 16_777_215,
        "DEFAULT_WINDOW": 65_535,
        "LARGEST_WINDOW": 2**31 - 1,
        "LARGEST_STREAM_ID": 2**31 - 1,
    },
    "hpack": {
        "ENTRY_OVERHEAD": 32,
        "DEFAULT_TABLE_SIZE": 4 * KIB,
        "MAX_CONTINUATION_OCTETS": 5,
        "MAX_INTEGER": 2**32,
        "_FIRST_DYNAMIC": 62,
        "_REMEMBERED_STRINGS": 1024,
        "_LONGEST_REMEMBERED_STRING": 64,
        "_LONGEST_WHOLE_STRING": 384,
    },
    "huffman": {"EOS": 256, "OCTETS_AT_ONCE": 128, "_STEPS_AT_ONCE": 16, "_NEW_STEPS_AT_ONCE": 8},
}
"""Module → name → value."""


def test_the_numbers_of_each_module_equal_the_stated_ones() -> None:
    assert deviations("grpc_h2.wire", STATED) == []
