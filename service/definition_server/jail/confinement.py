"""Confines a worker, and says beforehand whether the kernel can."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from definition_server.jail import calls, landlock, seccomp
from definition_server.jail.kernel import Architecture, architecture, hide_process

_RANDOM = "/dev/urandom"
"""C-core's library (Abseil) seeds its generator from it, and ends the process where it cannot."""


class Extent(StrEnum):
    """How far a worker is confined, as it reports it and ``/statusz`` shows it."""

    FULL = "full"
    """Landlock and seccomp."""
    LANDLOCK = "landlock"
    """Landlock alone: no file, no TCP connection; but processes, signals and other sockets."""
    SECCOMP = "seccomp"
    """seccomp alone. With TLS or grpcio, files can be opened for reading: there is no Landlock to tell them apart."""
    NONE = "none"


def extent_of(text: str) -> Extent:
    """The extent by its name; `Extent.NONE` for any other text."""
    return Extent(text) if text in tuple(Extent) else Extent.NONE


@dataclass(frozen=True, slots=True)
class Support:
    """What the running kernel offers to this process."""

    landlock_abi: int
    seccomp: bool

    @property
    def extent(self) -> Extent:
        """The most that a worker can be confined here."""
        if self.seccomp:
            return Extent.FULL if self.landlock_abi else Extent.SECCOMP
        return Extent.LANDLOCK if self.landlock_abi else Extent.NONE

    @property
    def missing(self) -> str:
        """What is missing, for a message; empty where nothing is."""
        lacks = [] if self.landlock_abi else ["Landlock"]
        lacks += [] if self.seccomp else ["seccomp filters"]
        return " and ".join(lacks)


def support() -> Support:
    """Ask the kernel. Changes nothing."""
    found = architecture()
    return Support(landlock.abi_version(), found is not None and seccomp.available(found))


class Jail:
    """The confinement of the process that makes it. To be entered before the process has a second thread.

    Args:
        offered: What the kernel offers; what is missing is left out.
        port: The TCP port that this worker binds itself, by gRPC's C-core; 0 where it adopts the master's socket.
        directories: Their files may be read.
    """

    def __init__(self, offered: Support, *, port: int = 0, directories: Iterable[str] = ()) -> None:
        self._offered = offered
        self._port = port
        self._readable = (*directories, *((_RANDOM,) if port else ()))
        self._architecture: Architecture | None = architecture() if offered.seccomp else None

    @property
    def extent(self) -> Extent:
        """How far it confines."""
        return self._offered.extent

    def enter(self) -> None:
        """Confine this process for good.

        Raises:
            OSError: where the kernel refuses what it offered; the process may be confined in part.
        """
        hide_process()
        if self._offered.landlock_abi:
            ports = (self._port,) if self._port else ()
            landlock.restrict(self._offered.landlock_abi, bind_ports=ports, readable=self._readable)
        if self._architecture is not None:
            allowed = calls.rules(
                self._architecture, os.getpid(), reads_files=bool(self._readable), opens_port=bool(self._port)
            )
            self._install(allowed, seccomp.refuse(1), every_thread=False)

    def close_ports(self) -> None:
        """The port is open: from now on no thread makes a socket. No effect where none could.

        Raises:
            OSError: where the kernel refuses.
        """
        if self._port and self._architecture is not None:
            self._install(calls.port_is_open(self._architecture), seccomp.ALLOW, every_thread=True)

    def _install(self, rules: dict[int, seccomp.Rule], otherwise: int, *, every_thread: bool) -> None:
        assert self._architecture is not None
        written = seccomp.program(self._architecture, rules, otherwise)
        seccomp.install(self._architecture, written, every_thread=every_thread)
