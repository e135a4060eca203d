"""Checks whether the files that settings name for TLS can be used."""

from __future__ import annotations

import re
import ssl
from enum import Enum
from pathlib import Path

LARGEST = 1024 * 1024
"""The most octets of a file. A bundle of all public authorities has a fifth of this size."""


_NOT_OF_THE_CERTIFICATE = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
"""OpenSSL's reasons if the certificate has another public key, or a key of another type (the last two)."""
_PLACE_IN_THE_LIBRARY = re.compile(r" \(_ssl\.c:\d+\)$")


class Pem(Enum):
    """The kind of content that a file must hold."""

    CERTIFICATE = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----")
    PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----")


def check_pem(path: Path | None, wanted: Pem) -> None:
    """Refuse a file that cannot be a PEM file of ``wanted``, with a reason that concerns only this file.

    Raises:
        ValueError: the reason.
    """
    if path is None:
        return
    check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ValueError(f"it cannot be read ({first_line(error)})") from None
    if len(content) > LARGEST:
        raise ValueError("it has more than 1 MiB")
    if not content.strip():
        raise ValueError("the file is empty")
    if wanted.value.search(content) is None:
        name = wanted.name.lower().replace("_", " ")
        form = "; it looks like DER, convert it with openssl" if content.startswith(b"\x30") else ""
        raise ValueError(f"it holds no {name} in PEM{form}")
    if wanted is Pem.CERTIFICATE:
        check_certificates(path)


def check_certificates(path: Path) -> None:
    """Refuse a file whose certificates cannot be read, whatever key belongs to them.

    Raises:
        ValueError: the reason.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"it cannot be loaded ({first_line(error)})") from None


def check_pair(certificate: Path | None, key: Path | None, variables: str) -> None:
    """Refuse a certificate and a key that cannot be loaded together.

    Raises:
        ValueError: the reason.
    """
    if (key is None) is not (certificate is None):
        raise ValueError(f"{variables} belong together")
    if key is not None and certificate is not None:
        try:
            # Without this, OpenSSL would request the password on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, _no_password)
        except (OSError, ValueError) as error:
            if getattr(error, "reason", None) in _NOT_OF_THE_CERTIFICATE:
                raise ValueError("the key does not belong to the certificate") from None
            raise ValueError(f"certificate and key cannot be loaded ({first_line(error)})") from None


def check_regular(path: Path | None) -> None:
    """Refuse a pipe, because it can be read only once, and the check of its content would read it.

    Raises:
        ValueError: the reason.
    """
    try:
        regular = path is None or path.is_file() or not path.exists()
    except OSError as error:
        raise ValueError(f"it cannot be read ({first_line(error)})") from None
    if not regular:
        raise ValueError("it is not a regular file")


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def first_line(error: Exception) -> str:
    """The text of OpenSSL's reason, without its additions."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    return _PLACE_IN_THE_LIBRARY.sub("", text)
