"""The TLS files in memory: a certificate chain, its key and, for mutual TLS, the authorities of clients, as PEM.

The master reads the files that an operator writes, and keeps the octets of the last set that was good. A worker gets
them as sealed memory, by descriptors that a message carries, so it needs no file. So a worker that is started while the
files on disk do not match serves with the last good files, like the other workers.

Libraries load PEM by path. The path of a descriptor in ``/proc/self/fd`` opens its memory, inside the jail too:
Landlock restricts only files in mounted file systems, and this memory is not in one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from definition_server.ipc.memory import SEALS, NotSealedError, create_sealed


class TlsFiles:
    """Descriptors of sealed memory, which this object owns. As a context, it closes them."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        """``descriptors``: certificate chain, key and, if clients need a certificate, their authorities.

        Raises:
            NotSealedError: if the descriptors are not two or three pieces of sealed memory. They are closed then.
        """
        self.descriptors = tuple(descriptors)
        try:
            if not 2 <= len(self.descriptors) <= 3:
                raise NotSealedError(f"{len(self.descriptors)} descriptors of TLS files, 2 or 3 expected")
            if not all(_is_sealed(each) for each in self.descriptors):
                raise NotSealedError("the memory of a TLS file could still change")
        except BaseException:
            self.close()
            raise

    @classmethod
    def seal(cls, certificate: bytes, key: bytes, client_authorities: bytes | None = None) -> Self:
        """Copy the octets into sealed memory.

        Raises:
            OSError: if memory or descriptors are exhausted.
        """
        contents = (certificate, key) if client_authorities is None else (certificate, key, client_authorities)
        made: list[int] = []
        try:
            made.extend(create_sealed("tls", [content]) for content in contents)  # a failure leaves earlier ones open
        except BaseException:
            for descriptor in made:
                os.close(descriptor)
            raise
        return cls(made)

    @property
    def certificate(self) -> str:
        """Path of the certificate chain, in this process."""
        return _path(self.descriptors[0])

    @property
    def key(self) -> str:
        """Path of the private key, in this process."""
        return _path(self.descriptors[1])

    @property
    def client_authorities(self) -> str | None:
        """Path of the authorities that must have issued the clients' certificates, in this process; None: clients need
        no certificate.
        """
        return _path(self.descriptors[2]) if len(self.descriptors) > 2 else None

    def octets(self) -> tuple[bytes, bytes, bytes | None]:
        """The contents, read without opening a file: certificate chain, key, client authorities."""
        certificate, key, *others = (os.pread(each, os.fstat(each).st_size, 0) for each in self.descriptors)
        return certificate, key, others[0] if others else None

    def close(self) -> None:
        """Close the descriptors. The memory is freed once no process has it open."""
        descriptors, self.descriptors = self.descriptors, ()
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _is_sealed(descriptor: int) -> bool:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:  # the descriptor is not sealed memory
        return False
