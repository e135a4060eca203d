"""A client and a server of TLS in memory."""

from __future__ import annotations

import ssl
from contextlib import suppress

from tests.support.certificates import Certificate

from grpc_h2 import TlsCredentials


class Pair:
    """A client and a server after their handshake. ``version``: the highest TLS version that the client offers."""

    def __init__(self, certificate: Certificate, version: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = version
        self.to_server, self.to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(self.to_client, self.to_server)
        self.server = TlsCredentials(certificate.cert, certificate.key).context.wrap_bio(
            self.to_server, self.to_client, server_side=True
        )
        for side in (self.client, self.server, self.client, self.server):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()

    def read(self) -> bytes:
        """The octets of the client that the server can read."""
        try:
            received: bytes = self.server.read(1000)
            return received
        except ssl.SSLWantReadError:
            return b""
