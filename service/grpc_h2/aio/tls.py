"""The certificate of a server, which can be replaced while the server runs, and the identity of a TLS client."""

from __future__ import annotations

import logging
import os
import ssl

from grpc_h2.aio.piecewise_tls import ServerContext
from grpc_h2.wire.errors import Http2Error

log = logging.getLogger("grpc_h2")


class CertificateFault(Http2Error):
    """The files do not hold a usable certificate, key and client CA."""


class TlsCredentials:
    """A certificate and its key, and optionally the CA that must have issued client certificates (mutual TLS).

    ``context`` is for the next connection; `reload` and `replace` change it, and leave established connections as they
    are.
    """

    def __init__(
        self,
        certificate: str | os.PathLike[str],
        key: str | os.PathLike[str],
        client_ca: str | os.PathLike[str] | None = None,
        *,
        require_client_certificate: bool = True,
    ) -> None:
        """The arguments are paths of PEM files. If ``require_client_certificate`` is False, a client need not
        present a certificate; but if it presents one, the certificate must be valid. Raises `CertificateFault`.
        """
        self._certificate = os.fspath(certificate)
        self._key = os.fspath(key)
        self._client_ca = None if client_ca is None else os.fspath(client_ca)
        self._required = require_client_certificate
        self.context = self._build()

    def reload(self) -> None:
        """Read the files again, for new connections.

        Raises:
            CertificateFault: if the files are not usable together (a pair may be half replaced). The fault is logged,
                and new connections use the certificate that was loaded before.
        """
        try:
            self.context = self._build()
        except CertificateFault as fault:
            log.error("The certificate was not replaced", extra={"error": str(fault)})
            raise
        log.info("Certificate loaded", extra={"file": self._certificate})

    def replace(
        self,
        certificate: str | os.PathLike[str],
        key: str | os.PathLike[str],
        client_ca: str | os.PathLike[str] | None = None,
    ) -> None:
        """Use other files, for new connections. They are read once, now.

        Raises:
            CertificateFault: if the files are not usable together. Then no file is replaced, and no line is logged.
        """
        before = self._certificate, self._key, self._client_ca
        self._certificate, self._key = os.fspath(certificate), os.fspath(key)
        self._client_ca = None if client_ca is None else os.fspath(client_ca)
        try:
            self.context = self._build()
        except CertificateFault:
            self._certificate, self._key, self._client_ca = before
            raise

    def _build(self) -> ServerContext:
        context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
        # RFC 9113 section 9.2: "Implementations of HTTP/2 MUST use TLS version 1.2 or higher".
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Section 9.2.1 forbids compression and renegotiation.
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        # Section 9.2.2 and appendix A: of TLS 1.2, only ephemeral key exchange with an AEAD cipher.
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
        context.set_alpn_protocols(["h2"])
        # OpenSSL's default is two session tickets. A client needs one ticket to resume, and gets another with its next
        # connection. Making a ticket takes 50 µs, a tenth of a handshake.
        context.num_tickets = 1
        try:
            # OpenSSL would ask for a passphrase on the terminal; a server has none.
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except (OSError, ValueError) as error:
            raise CertificateFault(f"{self._certificate} with {self._key}: {_reason(error)}") from error
        if self._client_ca is not None:
            try:
                context.load_verify_locations(self._client_ca)
            except (OSError, ValueError) as error:
                raise CertificateFault(f"{self._client_ca}: {_reason(error)}") from error
            # Each certificate of the file is trusted, also that of an intermediate authority, as in gRPC's C-core.
            # Without this flag, OpenSSL demands the chain up to a self-signed root.
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.verify_mode = ssl.CERT_REQUIRED if self._required else ssl.CERT_OPTIONAL
        return context


def peer_identity(tls: ssl.SSLObject) -> dict[str, list[bytes]]:
    """gRPC's auth context: the client's identity, under the property names of C-core."""
    known: dict[str, list[bytes]] = {"transport_security_type": [b"ssl"]}
    der = tls.getpeercert(binary_form=True)
    certificate = tls.getpeercert()
    if der is None or not certificate:
        return known
    names = [
        str(value)
        for relative in certificate.get("subject", ())
        for key, value in _pairs(relative)
        if key == "commonName"
    ]
    if names:
        known["x509_common_name"] = [names[0].encode()]
    alternatives = [str(value).encode() for _, value in _pairs(certificate.get("subjectAltName", ()))]
    if alternatives:
        known["x509_subject_alternative_name"] = alternatives
    known["x509_pem_cert"] = [ssl.DER_cert_to_PEM_cert(der).encode()]
    return known


def _pairs(entries: object) -> list[tuple[str, str]]:
    return [(entry[0], entry[1]) for entry in entries if len(entry) == 2] if isinstance(entries, tuple) else []


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or str(error)
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
