"""The expiry of certificates, compared with that of openssl."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from ssl import DER_cert_to_PEM_cert, PEM_cert_to_DER_cert, cert_time_to_seconds

import pytest
from tests.support.certificates import Authority

from definition_server.control_plane.certificates import _items, earliest_expiry


def by_openssl(path: Path) -> float:
    done = subprocess.run(
        ["openssl", "x509", "-in", path, "-noout", "-enddate"], check=True, capture_output=True, text=True
    )
    return float(cert_time_to_seconds(done.stdout.strip().removeprefix("notAfter=")))


@pytest.mark.parametrize("days", ["-1", "1", "9000", "20000"])
def test_the_expiry_is_the_one_that_openssl_shows(days: str, tmp_path: Path) -> None:
    """The expiry is a UTCTime before 2050, and a GeneralizedTime from then on. It is also read from an expired
    certificate."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert]
    if days == "-1":
        command += ["-not_before", "20200101000000Z", "-not_after", "20200201000000Z"]
        if subprocess.run([*command, "-subj", "/CN=x"], capture_output=True).returncode:
            pytest.skip("this openssl makes no expired certificate")
    else:
        subprocess.run([*command, "-subj", "/CN=x", "-days", days], check=True, capture_output=True)
    assert earliest_expiry(cert) == by_openssl(cert)


@pytest.mark.parametrize(("digits", "year"), [("00", 2000), ("49", 2049), ("50", 1950), ("99", 1999)])
def test_a_year_of_two_digits_lies_between_1950_and_2049(digits: str, year: int, tmp_path: Path) -> None:
    """RFC 5280, section 4.1.2.5.1."""
    octets = PEM_cert_to_DER_cert(Authority(tmp_path).sign("server").cert.read_text())
    before, after = re.findall(rb"\x17\x0d(\d{12}Z)", octets)
    path = tmp_path / "changed.pem"
    between = before + b"\x17\x0d"
    changed = octets.replace(between + after, between + digits.encode() + b"0203040506Z")
    path.write_text(DER_cert_to_PEM_cert(changed))
    assert earliest_expiry(path) == datetime(year, 2, 3, 4, 5, 6, tzinfo=UTC).timestamp()


def test_the_expiry_of_a_certificate_chain_is_that_of_its_first_expiring_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    made = authority.sign("server")
    chain = tmp_path / "chain.pem"
    chain.write_bytes(b"some text\n" + made.cert.read_bytes() + authority.cert.read_bytes())
    assert earliest_expiry(chain) == min(by_openssl(made.cert), by_openssl(authority.cert))


@pytest.mark.parametrize("damage", ["missing", "empty", "key", "cut"])
def test_a_file_without_a_readable_certificate_has_no_known_expiry(damage: str, tmp_path: Path) -> None:
    made = Authority(tmp_path).sign("server")
    path = tmp_path / "file.pem"
    if damage == "key":
        path = made.key
    elif damage == "empty":
        path.touch()
    elif damage == "cut":
        lines = made.cert.read_text().splitlines()
        path.write_text("\n".join([*lines[:3], lines[-1]]))
    assert earliest_expiry(path) is None


def test_a_constructed_value_is_a_list_of_tags_and_contents() -> None:
    assert _items(b"") == []
    assert _items(b"\x30\x02ab\x05\x00\x04\x81\x03abc\x04\x82\x00\x01d") == [
        (0x30, b"ab"), (0x05, b""), (0x04, b"abc"), (0x04, b"d"),
    ]  # fmt: skip


@pytest.mark.parametrize("octets", [b"\x30\x03ab", b"\x04\x81\x04abc", b"\x05\x00\x30\x01"])
def test_a_truncated_value_is_read_as_none(octets: bytes) -> None:
    with pytest.raises(ValueError, match="cut off"):
        _items(octets)
