"""Certificates for tests, made by the ``openssl`` command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Certificate:
    """The PEM files of a certificate and its key."""

    cert: Path
    key: Path


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


class Authority:
    """A certificate authority in ``folder``, and what it signs. Skips the test where there is no ``openssl``."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("no openssl command here")
        self._folder = folder
        self._own = self._files(name)
        self._request(self._own, name, "-x509", "-addext", "basicConstraints=critical,CA:TRUE")

    @property
    def cert(self) -> Path:
        """The file that a peer trusts."""
        return self._own.cert

    def sign(self, name: str) -> Certificate:
        """A certificate for ``localhost`` and 127.0.0.1 whose common name is ``name``."""
        made = self._files(name)
        signer = ("-CA", str(self._own.cert), "-CAkey", str(self._own.key))
        self._request(made, name, "-x509", *signer, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        return made

    def _files(self, name: str) -> Certificate:
        return Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")

    def _request(self, files: Certificate, name: str, *more: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(files.key))
        _openssl("req", *key, "-subj", f"/CN={name}", "-days", "2", "-out", str(files.cert), *more)
