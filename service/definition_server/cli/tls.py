"""TLS of the client commands: trusted authorities, the client certificate, and advice if a connection fails."""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from definition_server.cli.client_settings import ClientSettings
from definition_server.cli.exits import unusable_environment
from definition_server.environment import Problem

_CLOSED = ("Socket closed", "Connection reset", "Broken pipe", "_ALERT_", "TSI_DATA_CORRUPTED", "http1.x server")
"""gRPC's words for a connection that was established and then closed by the other side: in TLS 1.2 by an alert; in TLS
1.3 by an alert after the client's handshake, which gRPC reports as corrupted data."""

_NO_TLS = ("WRONG_VERSION_NUMBER", "ALERT_PROTOCOL_VERSION")
"""OpenSSL's words if the other side does not use TLS; our server sends this alert in that case."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM: the authorities that verify the server's certificate, and the client's certificate and key, if any."""

    authorities: bytes
    certificate: bytes | None
    key: bytes | None


def tls_of(settings: ClientSettings) -> Tls | None:
    """The TLS part of ``settings``; None for cleartext.

    Raises:
        CommandFailed: (exit code 78) if the system's authorities are requested and there are none.
    """
    if settings.ca_file is None:
        return None
    authorities = system_authorities() if settings.ca_file == "system" else settings.ca_file.read_bytes()
    if not authorities:
        remedy = "Install the package ca-certificates, or name a PEM file"
        raise unusable_environment([Problem("DEFINITION_SERVER_CA_FILE", "system", "none are installed", remedy)])
    cert, key = settings.client_cert_file, settings.client_key_file
    return Tls(authorities, None if cert is None else cert.read_bytes(), None if key is None else key.read_bytes())


def system_authorities() -> bytes:
    """The authorities that OpenSSL trusts on this machine (``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` included), as PEM.

    gRPC's default is a built-in list, which lacks a company's own authorities.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    folder = ssl.get_default_verify_paths().capath
    # OpenSSL reads the folder only when it verifies, so `get_ca_certs` does not return its files yet.
    for file in sorted(Path(folder).iterdir()) if folder is not None else ():
        with suppress(OSError):  # this includes ssl.SSLError: some files are not certificates
            context.load_verify_locations(file)
    return "".join(map(ssl.DER_cert_to_PEM_cert, context.get_ca_certs(binary_form=True))).encode()


def advice(cause: str, tls: Tls | None) -> str | None:
    """A remedy, if TLS or its absence explains ``cause``, gRPC's text for an unavailable server; otherwise None."""
    closed = any(sign in cause for sign in _CLOSED)
    if tls is None:
        todo = "if it serves TLS, set --ca-file (DEFINITION_SERVER_CA_FILE)"
    elif any(sign in cause for sign in _NO_TLS):
        return "It serves no TLS: leave --ca-file (DEFINITION_SERVER_CA_FILE) out to call in cleartext"
    elif "Hostname Verification" in cause:
        return "Call it by a name that its certificate holds: set --host (DEFINITION_SERVER_HOST)"
    elif "CERTIFICATE_VERIFY_FAILED" in cause:
        return (
            "Its certificate is not trusted: set --ca-file (DEFINITION_SERVER_CA_FILE) to the authority that signed it"
        )
    else:
        todo = (
            "if it demands a client certificate, set --client-cert-file and --client-key-file "
            "(DEFINITION_SERVER_CLIENT_CERT_FILE and DEFINITION_SERVER_CLIENT_KEY_FILE) to one that it trusts"
        )
    return f"Check that it is ready; {todo}" if closed else None
