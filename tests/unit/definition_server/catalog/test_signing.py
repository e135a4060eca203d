"""A signed package has exactly the octets that deployed language servers verify. It opens only with its own key, and a
changed, missing or added octet is detected.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from definition_server.catalog.signing import OVERHEAD, UNSIGNED, Binding, SignatureError, Signer, payload_of

KEYS = st.text(min_size=1, max_size=80)


@given(KEYS, st.binary(max_size=300))
def test_a_package_has_the_layout_of_the_contract(key: str, payload: bytes) -> None:
    header = b"AVAP" + struct.pack(">H", 1) + struct.pack(">I", len(payload))
    mac = hmac.new(key.encode("utf-8"), header + payload, hashlib.sha256).digest()
    assert Signer(key).pack(payload) == header + mac + payload
    assert len(header + mac) == OVERHEAD == 42


def test_a_known_package_never_changes() -> None:
    assert Signer("clé").pack("task = 'ñ'".encode()).hex() == (
        "4156415000010000000ba7cbdc642d487b2474f0faf4e24af317a078303d10bbdf811221011ba64eae727461736b203d2027c3b127"
    )


@given(KEYS, st.binary(max_size=300))
def test_a_package_opens_under_its_own_key(key: str, payload: bytes) -> None:
    package = Signer(key).pack(payload)
    assert Signer(key).unpack(package) == payload
    assert payload_of(package) == payload


@given(KEYS, KEYS, st.binary(max_size=100))
def test_a_package_opens_under_no_other_key(key: str, other: str, payload: bytes) -> None:
    # HMAC pads short keys with NUL, so these are one key and not two.
    if key.rstrip("\0") == other.rstrip("\0"):
        return
    with pytest.raises(SignatureError, match="another key"):
        Signer(other).unpack(Signer(key).pack(payload))


PACKAGE = Signer("key").pack(b"task = None\n")


@pytest.mark.parametrize("position", range(len(PACKAGE)))
def test_a_changed_octet_at_any_place_is_refused(position: int) -> None:
    for change in range(1, 256):
        tampered = bytearray(PACKAGE)
        tampered[position] ^= change
        with pytest.raises(SignatureError):
            Signer("key").unpack(bytes(tampered))


def test_a_lost_or_added_octet_is_refused() -> None:
    for end in range(len(PACKAGE)):
        with pytest.raises(SignatureError):
            Signer("key").unpack(PACKAGE[:end])
        with pytest.raises(SignatureError):
            payload_of(PACKAGE[:end])
    with pytest.raises(SignatureError, match="12 bytes of payload, 13 are there"):
        Signer("key").unpack(PACKAGE + b"\n")


@given(st.binary(max_size=80))
def test_any_bytes_give_a_payload_or_the_documented_error(octets: bytes) -> None:
    for read in (payload_of, Signer("key").unpack):
        with pytest.raises(SignatureError):
            read(octets)


def test_source_code_is_not_mistaken_for_a_package() -> None:
    with pytest.raises(SignatureError, match="too short"):
        payload_of(b"pass")
    with pytest.raises(SignatureError, match="magic"):
        payload_of(b"task = None  # a comment that makes it long enough\n")
    with pytest.raises(SignatureError, match="version 3"):
        payload_of(b"AVAP" + struct.pack(">HI", 3, 0) + bytes(32))


@given(KEYS, KEYS)
def test_key_ids_differ_between_keys_and_from_the_id_without_a_key(key: str, other: str) -> None:
    assert Signer(key).key_id == Signer(key).key_id
    assert (Signer(key).key_id == Signer(other).key_id) == (key.rstrip("\0") == other.rstrip("\0"))
    assert len(Signer(key).key_id) == len(UNSIGNED) == 8
    assert Signer(key).key_id != UNSIGNED


@given(KEYS)
def test_a_key_id_is_derived_from_the_key_by_its_purpose_and_by_the_version(key: str) -> None:
    for version, purpose in ((1, b"AVAP definition server: key id"), (2, b"AVAP definition server: key id 2")):
        assert Signer(key, version).key_id == hmac.new(key.encode("utf-8"), purpose, hashlib.sha256).digest()[:8]


# -- MACs of files ---------------------------------------------------------------------------------------------------

FILES = {
    b"AVAP definition server: last-known-good file": (Signer.file_mac, Signer.made_file_mac),
    b"AVAP definition server: wishes": (Signer.wishes_mac, Signer.made_wishes_mac),
}
"""The purpose from which the key of a file is derived → its MAC, and the check."""


@pytest.mark.parametrize("purpose", FILES, ids=["snapshot", "wishes"])
@given(KEYS, st.binary(max_size=80))
def test_the_mac_of_a_file_is_made_with_a_key_that_is_derived_for_it(purpose: bytes, key: str, octets: bytes) -> None:
    mac, _ = FILES[purpose]
    derived = hmac.new(key.encode("utf-8"), purpose, hashlib.sha256).digest()
    assert mac(Signer(key), octets) == hmac.new(derived, octets, hashlib.sha256).digest()


@pytest.mark.parametrize("purpose", FILES, ids=["snapshot", "wishes"])
def test_the_mac_of_a_file_is_valid_for_these_octets_under_the_present_and_the_previous_key(purpose: bytes) -> None:
    mac, made = FILES[purpose]
    other_mac, _ = next(each for name, each in FILES.items() if name != purpose)
    previous = Signer("previous")
    present = Signer("present", previous=previous)
    assert made(present, mac(present, b"octets"), b"octets")
    assert made(present, mac(previous, b"octets"), b"octets")
    assert not made(previous, mac(present, b"octets"), b"octets")
    assert not made(present, mac(Signer("another"), b"octets"), b"octets")
    assert not made(present, mac(present, b"octets"), b"other octets")
    assert not made(present, other_mac(present, b"octets"), b"octets"), "each kind of file has its own key"


# -- version 2 -------------------------------------------------------------------------------------------------------

OCTETS = st.binary(max_size=40)
BINDINGS = st.builds(Binding, OCTETS, OCTETS, OCTETS, OCTETS)
BINDING = Binding(b"if", b"function", b"[]", b"ab" * 32)


@given(KEYS, OCTETS, BINDINGS)
def test_a_package_of_version_2_has_the_documented_layout(key: str, payload: bytes, binding: Binding) -> None:
    header = b"AVAP" + struct.pack(">HI", 2, len(payload))
    parts = (binding.name, binding.type, binding.interface, binding.hash)
    bound = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    mac = hmac.new(key.encode("utf-8"), header + bound + payload, hashlib.sha256).digest()
    package = Signer(key, 2).pack(payload, binding)
    assert package == header + mac + payload
    assert Signer(key, 2).unpack(package, binding) == payload_of(package) == payload


@given(BINDINGS, BINDINGS)
def test_a_package_of_version_2_opens_only_in_its_own_answer(one: Binding, other: Binding) -> None:
    package = Signer("key", 2).pack(b"pass", one)
    if one != other:
        with pytest.raises(SignatureError, match="does not match"):
            Signer("key", 2).unpack(package, other)


def test_a_package_of_one_version_does_not_open_as_one_of_the_other() -> None:
    one, two = Signer("key"), Signer("key", 2)
    assert one.key_id != two.key_id, "a change of the version rebuilds the catalogue"
    with pytest.raises(SignatureError, match="version 2"):
        two.unpack(one.pack(b"pass"), BINDING)
    with pytest.raises(SignatureError, match="version 1"):
        one.unpack(two.pack(b"pass", BINDING))
    relabelled = b"AVAP\x00\x01" + two.pack(b"pass", BINDING)[6:]
    with pytest.raises(SignatureError, match="does not match"):
        one.unpack(relabelled)


def test_version_1_does_not_depend_on_a_binding() -> None:
    assert Signer("key").pack(b"pass", BINDING) == Signer("key").pack(b"pass")
