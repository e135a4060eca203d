"""The confinement of one worker: it enters the jail that ``JAIL`` requests, and reports how far that succeeded."""

from __future__ import annotations

from definition_server.data_plane.preload import preload
from definition_server.ipc.messages import Configure
from definition_server.jail.confinement import Extent, Jail, support
from definition_server.observability.logs import get_logger

log = get_logger(__name__)


class CannotConfine(Exception):
    """``JAIL`` is ``require``, and the kernel refuses a part of the jail. The message names it."""


class Confinement:
    """The confinement of the process that creates this object."""

    def __init__(self, config: Configure, *, tls: bool) -> None:
        """``tls``: whether the worker receives TLS files by descriptors, at the start and when they are replaced."""
        self._required = config.jail == "require"
        self._jail: Jail | None = None
        self._config = config
        if config.jail != "off":
            # gRPC's C-core creates its own listening socket; the native transport uses the master's socket.
            native = config.transport == "native"
            # In the native transport, OpenSSL loads TLS files by path; grpcio takes their octets.
            self._jail = Jail(support(), port=0 if native else config.port, opens_memory=tls and native)

    @property
    def extent(self) -> Extent:
        """The present degree of confinement."""
        return Extent.NONE if self._jail is None else self._jail.reached.extent

    def enter(self) -> None:
        """Confine the process. Must be called before it has a second thread or an event loop.

        Raises:
            CannotConfine: if confinement is required and fails.
        """
        if self._jail is None:
            return
        preload(self._config)
        self._report(self._jail.enter())
        if self._required and self.extent is not Extent.FULL:
            raise CannotConfine("JAIL is require, and the kernel cannot confine this process")

    def start_is_over(self) -> None:
        """Called when the transport listens. System calls that only the start needed are refused from now on.

        Raises:
            CannotConfine: if confinement is required and fails.
        """
        if self._jail is not None:
            self._report(self._jail.start_is_over())

    def _report(self, failures: list[str]) -> None:
        if failures and self._required:
            raise CannotConfine(f"JAIL is require, and the kernel refuses: {'; '.join(failures)}")
        if failures:
            log.warning("The worker is not confined as it should be", error="; ".join(failures), jail=self.extent)
