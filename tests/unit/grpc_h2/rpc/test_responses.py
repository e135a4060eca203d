"""The header blocks of answers: their fields; and clients reject no block, with any metadata and any message."""

from __future__ import annotations

import string
from base64 import b64decode
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grpc_h2.rpc import responses
from grpc_h2.rpc.requests import check_trailers
from grpc_h2.rpc.responses import (
    MAX_TRAILERS,
    http_block,
    initial_block,
    metadata_fields,
    percent_encode,
    trailers_block,
    trailers_only_block,
)
from grpc_h2.wire.hpack import Decoder

Fields = tuple[tuple[bytes, bytes], ...]

HEAD: Fields = ((b":status", b"200"), (b"content-type", b"application/grpc"))
ACCEPT = (b"grpc-accept-encoding", b"identity, deflate, gzip")
TEXT = st.one_of(st.text(max_size=50), st.text(alphabet=" %aé€😀\n\0", max_size=50))


def decoded(block: bytes) -> Fields:
    """The fields of a block, which must leave the peer's table alone."""
    decoder = Decoder(max_list_size=1 << 20, max_fields=1000)
    fields = decoder.decode(block)
    assert not decoder.changed
    assert not decoder.overflow
    return tuple(fields)


def list_size(fields: Fields) -> int:
    return sum(len(name) + len(value) + 32 for name, value in fields)


@pytest.mark.requirement("A43")
def test_initial_headers_are_status_200_and_the_content_type() -> None:
    assert decoded(initial_block((), None)) == HEAD
    assert decoded(initial_block((), "gzip")) == (*HEAD, (b"grpc-encoding", b"gzip"), ACCEPT)
    assert decoded(initial_block([("x", "1"), ("x-bin", b"\1")], None)) == (*HEAD, (b"x", b"1"), (b"x-bin", b"AQ"))


@pytest.mark.requirement("A43")
def test_trailers_carry_a_status_without_leading_zeros_for_ok_too() -> None:
    assert decoded(trailers_block(0, "")) == ((b"grpc-status", b"0"),)
    assert decoded(trailers_block(5, "no such command")) == (
        (b"grpc-status", b"5"),
        (b"grpc-message", b"no such command"),
    )
    assert decoded(trailers_block(0, "", [("x", "1")])) == ((b"grpc-status", b"0"), (b"x", b"1"))


@pytest.mark.requirement("A43")
def test_one_block_can_be_the_whole_answer() -> None:
    assert decoded(trailers_only_block(13, "m", [("x", "1")])) == (
        *HEAD,
        (b"grpc-status", b"13"),
        (b"grpc-message", b"m"),
        (b"x", b"1"),
    )


@pytest.mark.requirement("A38")
def test_an_unimplemented_status_names_the_known_encodings() -> None:
    assert decoded(trailers_only_block(12, "")) == (*HEAD, (b"grpc-status", b"12"), ACCEPT)


@pytest.mark.requirement("A33")
def test_a_plain_http_answer_has_a_length_and_405_names_the_method() -> None:
    plain = ((b"content-type", b"text/plain"), (b"content-length", b"17"))
    assert decoded(http_block(415, 17)) == ((b":status", b"415"), *plain)
    assert decoded(http_block(405, 17)) == ((b":status", b"405"), *plain, (b"allow", b"POST"))


@pytest.mark.requirement("A44")
@given(TEXT)
@example("100 %")
@example(" spaces at the ends  ")
@example("\r\ngrpc-status: 0")
@example("")
def test_an_encoded_message_is_printable_ascii_and_decodes_to_the_original(message: str) -> None:
    encoded = percent_encode(message)
    assert set(encoded) <= set(range(0x20, 0x7F))
    assert encoded == encoded.strip(b" ")
    assert unquote(encoded.decode(), errors="strict") == message


@pytest.mark.requirement("A44")
@pytest.mark.parametrize(
    ("message", "encoded"),
    [
        ("plain text, ~!", b"plain text, ~!"),
        ("50%", b"50%25"),
        ("é\t€", b"%C3%A9%09%E2%82%AC"),
        (" a b ", b"%20a b%20"),
        ("   ", b"%20%20%20"),
        ("\x7f", b"%7F"),
        ("\ud800", b"?"),
    ],
)
def test_a_message_is_percent_encoded(message: str, encoded: bytes) -> None:
    assert percent_encode(message) == encoded


@pytest.mark.requirement("A44")
@given(st.text(alphabet=" %aé€😀\n", min_size=1, max_size=3), st.integers(8200, 12_000), st.integers(1, 3))
def test_a_long_message_is_cut_between_characters(part: str, repeats: int, lead: int) -> None:
    message = "x" * lead + part * repeats
    for block in (
        trailers_block(13, message),
        trailers_only_block(13, message, [("x", "y" * 99)]),
        trailers_only_block(12, message),
    ):
        fields = decoded(block)
        assert list_size(fields) < MAX_TRAILERS
        text = dict(fields)[b"grpc-message"]
        assert text == text.strip(b" ")
        assert message.startswith(unquote(text.decode(), errors="strict"))
        # No more is cut than necessary: at most one more character would fit, apart from spaces at the end of the
        # message.
        assert MAX_TRAILERS - list_size(fields) <= 13 + len(part) or part.strip(" ") == ""


@pytest.mark.requirement("A44")
@given(st.integers(8060, 8130))
def test_a_message_is_whole_as_long_as_it_fits(length: int) -> None:
    fields = decoded(trailers_block(13, "m" * length))
    fits = list_size(((b"grpc-status", b"13"), (b"grpc-message", b"m" * length))) < MAX_TRAILERS
    assert (dict(fields)[b"grpc-message"] == b"m" * length) == fits
    if not fits:
        assert list_size(fields) == MAX_TRAILERS - 1


@given(TEXT, st.integers(-3, 70))
@example("a", 1)
@example("ab", 1)
@example("ä", 5)
@example("a   b", 4)
@example("ab  ", 5)
def test_as_much_of_a_message_as_fits_is_sent_in_whole_characters(message: str, room: int) -> None:
    found = responses._fit(message, room)
    assert len(found) <= max(0, room)
    text = unquote(found.decode("ascii"))
    assert message.startswith(text)
    rest = message[len(text) :]
    if rest:  # only spaces are not added, because a space at the end must be escaped
        spaces = len(rest) - len(rest.lstrip(" "))
        assert len(percent_encode(message[: len(text) + spaces + 1])) > room


@pytest.mark.requirement("A44")
def test_metadata_takes_precedence_over_the_message() -> None:
    fields = decoded(trailers_block(13, "message", [("x", "y" * 9000)]))
    assert fields == ((b"grpc-status", b"13"), (b"x", b"y" * 9000))


@pytest.mark.requirement("A42")
@given(st.binary(max_size=50))
def test_binary_metadata_is_sent_unpadded(value: bytes) -> None:
    ((name, text),) = metadata_fields([("a-bin", value)])
    assert name == b"a-bin"
    assert b"=" not in text
    assert b64decode(text + b"=" * (-len(text) % 4), validate=True) == value


@given(st.lists(st.tuples(st.text(max_size=6), st.one_of(st.text(max_size=6), st.binary(max_size=6))), max_size=4))
def test_metadata_is_encoded_well_formed_or_refused(metadata: list[tuple[str, str | bytes]]) -> None:
    try:
        fields = metadata_fields(metadata)
    except ValueError:
        return
    check_trailers(fields)
    assert decoded(trailers_block(0, "", metadata)) == ((b"grpc-status", b"0"), *fields)


@pytest.mark.parametrize(
    "name", ["", "X", ":status", "a b", "é", "a\n", "te", "grpc-status", "content-type", "connection", "content-length"]
)
def test_malformed_and_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="metadata key"):
        trailers_block(0, "", [(name, "v")])
    with pytest.raises(ValueError, match="metadata key"):
        initial_block([(name, "v")], None)


@pytest.mark.parametrize("value", ["a\r\nb", "\0", "é", "\x7f", b"\xff", "a\t"])
def test_values_beyond_printable_ascii_are_refused(value: str | bytes) -> None:
    with pytest.raises(ValueError, match="printable"):
        trailers_block(0, "", [("x", value)])


def test_names_that_grpc_defines_for_handlers_are_accepted() -> None:
    metadata: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", b"\1"),
        ("grpc-retry-pushback-ms", "5"),
        ("a_b.c-9", string.punctuation),
    ]
    assert [name for name, _ in metadata_fields(metadata)] == [name.encode() for name, _ in metadata]


@pytest.mark.requirement("A29")
def test_edge_spaces_of_a_value_are_not_sent() -> None:
    assert metadata_fields([("x", "  a b ")]) == ((b"x", b"a b"),)


@pytest.mark.requirement("A44")
@pytest.mark.parametrize("length", [499, 500, 501, 502])
@pytest.mark.parametrize("character", ["x", "%", " ", "é", "🦊"])
def test_short_and_long_messages_are_encoded_in_the_same_way(character: str, length: int):
    """Messages of up to 500 characters are encoded by a shorter path."""
    told = dict(decoded(trailers_only_block(5, character * length)))[b"grpc-message"]
    assert told == percent_encode(character * length)
