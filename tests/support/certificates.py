"""Certificates for tests, made by the ``openssl`` command."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_CONFIGURATION = """
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[signed]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = $ENV::NAMES
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""
"""The extensions that RFC 5280, section 4.2, requires; ``ssl.create_default_context`` checks them since Python 3.13
(``VERIFY_X509_STRICT``). The list is complete, so that the machine's own openssl.cnf adds nothing."""

LOCAL_NAMES = "DNS:localhost, IP:127.0.0.1"


@dataclass(frozen=True)
class Certificate:
    """The PEM files of a certificate and its key."""

    cert: Path
    key: Path


def _openssl(*arguments: str, names: str) -> None:
    environment = os.environ | {"NAMES": names}
    subprocess.run(["openssl", *arguments], env=environment, check=True, capture_output=True, timeout=60)


class Authority:
    """A certificate authority in ``folder`` and its certificates. Skips the test if ``openssl`` is missing."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("no openssl command here")
        self._folder = folder
        self._config = folder / f"{name}.cnf"
        self._config.write_text(_CONFIGURATION, encoding="ascii")
        self._own = self._files(name)
        self._request(self._own, name, "-extensions", "authority")

    @property
    def cert(self) -> Path:
        """The file that a peer trusts."""
        return self._own.cert

    def sign(self, name: str, names: str = LOCAL_NAMES) -> Certificate:
        """A certificate whose common name is ``name``, for the hosts ``names`` (as in x509v3_config(5))."""
        made = self._files(name)
        signer = ("-CA", str(self._own.cert), "-CAkey", str(self._own.key))
        self._request(made, name, *signer, "-extensions", "signed", names=names)
        return made

    def intermediate(self, name: str) -> Authority:
        """An intermediate authority; this authority has signed its certificate."""
        made = Authority.__new__(Authority)
        made._folder, made._config = self._folder, self._config
        made._own = self._files(name)
        signer = ("-CA", str(self._own.cert), "-CAkey", str(self._own.key))
        self._request(made._own, name, *signer, "-extensions", "authority")
        return made

    def _files(self, name: str) -> Certificate:
        return Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")

    def _request(self, files: Certificate, name: str, *more: str, names: str = LOCAL_NAMES) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(files.key))
        kind = ("-x509", "-config", str(self._config))
        _openssl("req", *kind, *key, "-subj", f"/CN={name}", "-days", "2", "-out", str(files.cert), *more, names=names)
