"""Confines a worker, and reports beforehand which protections the kernel offers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from definition_server.jail import calls, landlock, seccomp
from definition_server.jail.kernel import Architecture, architecture, hide_process

_RANDOM = "/dev/urandom"
"""C-core's library (Abseil) seeds its random generator from this file, and ends the process if it cannot."""


class Extent(StrEnum):
    """The degree of a worker's confinement, which the worker reports and ``/statusz`` shows."""

    FULL = "full"
    """Landlock and seccomp are in effect."""
    LANDLOCK = "landlock"
    """Landlock alone is in effect: files and TCP connections are refused, but processes, signals and other sockets are
    not."""
    SECCOMP = "seccomp"
    """seccomp alone is in effect. With TLS or grpcio, files can be opened for reading until the port is open, but not
    later."""
    NONE = "none"


def extent_of(text: str) -> Extent:
    """The extent with this name; `Extent.NONE` for any other text."""
    return Extent(text) if text in tuple(Extent) else Extent.NONE


class Support(NamedTuple):
    """The protections that the running kernel offers to this process."""

    landlock_abi: int
    seccomp: bool

    @property
    def extent(self) -> Extent:
        """The highest degree of confinement on this machine."""
        if self.seccomp:
            return Extent.FULL if self.landlock_abi else Extent.SECCOMP
        return Extent.LANDLOCK if self.landlock_abi else Extent.NONE

    @property
    def missing(self) -> str:
        """The missing protections, for a message; empty if none is missing."""
        lacks = [] if self.landlock_abi else ["Landlock"]
        lacks += [] if self.seccomp else ["seccomp filters"]
        return " and ".join(lacks)


def support() -> Support:
    """Query the kernel, without a change."""
    found = architecture()
    return Support(landlock.abi_version(), found is not None and seccomp.available(found))


class Jail:
    """The confinement of the process that creates this object. `enter` must be called before the process has a second
    thread.

    Args:
        offered: The protections that the kernel offers; a missing protection is left out.
        port: The TCP port that this worker binds itself, by gRPC's C-core; 0 if it uses the master's socket.
        opens_memory: Whether the worker may open unnamed memory, whose descriptors it receives, by its path in
            ``/proc/self/fd``. seccomp cannot distinguish such a path from other paths; Landlock can. Without Landlock,
            no file can be opened once the worker has started.
    """

    def __init__(self, offered: Support, *, port: int = 0, opens_memory: bool = False) -> None:
        self._offered = offered
        self._port = port
        self._readable = (_RANDOM,) if port else ()
        self._opens = opens_memory or bool(self._readable)
        self._architecture: Architecture | None = architecture() if offered.seccomp else None

        self.reached = Support(0, seccomp=False)
        """The protections that confine the process now."""

    def enter(self) -> list[str]:
        """Confine this process for good, as far as possible.

        Returns:
            The protections that the kernel refused although it had offered them, with its reasons.
        """
        return [
            failure for step in (hide_process, self._enter_landlock, self._enter_seccomp) if (failure := _try(step))
        ]

    def start_is_over(self) -> list[str]:
        """Called when the port is open. From now on no thread can make a socket or, without Landlock, open a file. No
        effect if these calls were refused already.

        Returns:
            As `enter`.
        """
        failure = _try(self._refuse_what_only_the_start_needs)
        return [failure] if failure else []

    def _enter_landlock(self) -> None:
        abi = self._offered.landlock_abi
        if abi:
            landlock.restrict(abi, bind_ports=(self._port,) if self._port else (), readable=self._readable)
            self.reached = self.reached._replace(landlock_abi=abi)

    def _enter_seccomp(self) -> None:
        here = self._architecture
        if here is not None:
            allowed = calls.rules(
                here,
                os.getpid(),
                reads_files=self._opens,
                opens_port=bool(self._port),
                stacks=bool(self._port) or self._refuses_files_later,
            )
            seccomp.install(here, seccomp.program(here, allowed, seccomp.refuse(errno.EPERM)))
            self.reached = self.reached._replace(seccomp=True)

    @property
    def _refuses_files_later(self) -> bool:
        return self._opens and not self.reached.landlock_abi

    def _refuse_what_only_the_start_needs(self) -> None:
        here = self._architecture
        if (self._port or self._refuses_files_later) and here is not None and self.reached.seccomp:
            refused = calls.refused_once_started(here, files=self._refuses_files_later)
            written = seccomp.program(here, refused, seccomp.ALLOW)
            seccomp.install(here, written, every_thread=True)


def _try(step: Callable[[], None]) -> str:
    """The reason why ``step`` failed; empty if it succeeded."""
    try:
        step()
    except OSError as error:
        return f"{step.__name__.strip('_').replace('_', ' ')}: {error.strerror}"
    return ""
