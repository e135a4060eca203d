"""The confinement of one worker: it enters the jail that ``JAIL`` asks for, and says how far that succeeded."""

from __future__ import annotations

from definition_server.data_plane.preload import preload
from definition_server.ipc.messages import Configure
from definition_server.jail.confinement import Extent, Jail, support
from definition_server.observability.logs import get_logger

log = get_logger(__name__)


class CannotConfine(Exception):
    """``JAIL`` is ``require``, and the kernel refuses. The message says what."""


class Confinement:
    """Of the process that makes it."""

    def __init__(self, config: Configure, *, tls: bool) -> None:
        """``tls``: TLS files come by descriptors, at the start and when they are replaced."""
        self._required = config.jail == "require"
        self._jail: Jail | None = None
        self._config = config
        if config.jail != "off":
            # gRPC's C-core makes its listening socket itself; the native transport adopts the master's.
            native = config.transport == "native"
            # The native transport has OpenSSL load them by path; grpcio takes their octets.
            self._jail = Jail(support(), port=0 if native else config.port, opens_memory=tls and native)

    @property
    def extent(self) -> Extent:
        """How far the process is confined now."""
        return Extent.NONE if self._jail is None else self._jail.reached.extent

    def enter(self) -> None:
        """Confine the process; before it has a second thread or an event loop.

        Raises:
            CannotConfine: where that is required and fails.
        """
        if self._jail is None:
            return
        preload(self._config)
        self._report(self._jail.enter())
        if self._required and self.extent is not Extent.FULL:
            raise CannotConfine("JAIL is require, and the kernel cannot confine this process")

    def start_is_over(self) -> None:
        """The transport listens: what only its start needed is refused from now on.

        Raises:
            CannotConfine: where that is required and fails.
        """
        if self._jail is not None:
            self._report(self._jail.start_is_over())

    def _report(self, failures: list[str]) -> None:
        if failures and self._required:
            raise CannotConfine(f"JAIL is require, and the kernel refuses: {'; '.join(failures)}")
        if failures:
            log.warning("The worker is not confined as it should be", error="; ".join(failures), jail=self.extent)
