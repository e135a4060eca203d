"""The confinement of one worker: it enters the jail that ``JAIL`` asks for, and says how far that succeeded."""

from __future__ import annotations

from pathlib import Path

from definition_server.data_plane.preload import preload
from definition_server.ipc.messages import Configure
from definition_server.jail.confinement import Extent, Jail, support
from definition_server.observability.logs import get_logger

log = get_logger(__name__)


class CannotConfine(Exception):
    """``JAIL`` is ``require``, and the kernel refuses. The message says what."""


class Confinement:
    """Of the process that makes it."""

    def __init__(self, config: Configure) -> None:
        self._required = config.jail == "require"
        self._jail: Jail | None = None
        self._transport = config.transport
        if config.jail != "off":
            # gRPC's C-core makes its listening socket itself; the native transport adopts the master's.
            port = config.port if config.transport != "native" else 0
            self._jail = Jail(support(), port=port, directories=_tls_directories(config))

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
        preload(self._transport)
        self._report(self._jail.enter())
        if self._required and self.extent is not Extent.FULL:
            raise CannotConfine("JAIL is require, and the kernel cannot confine this process")

    def close_ports(self) -> None:
        """The transport listens: no further socket is made.

        Raises:
            CannotConfine: where that is required and fails.
        """
        if self._jail is not None:
            self._report(self._jail.close_ports())

    def _report(self, failures: list[str]) -> None:
        if failures and self._required:
            raise CannotConfine(f"JAIL is require, and the kernel refuses: {'; '.join(failures)}")
        if failures:
            log.warning("The worker is not confined as it should be", error="; ".join(failures), jail=self.extent)


def _tls_directories(config: Configure) -> set[str]:
    """Where the TLS files are, which are read again when they are replaced: by another file, or by another link."""
    files = (Path(each) for each in (config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file) if each)
    return {str(path.parent) for file in files for path in (file.absolute(), file.resolve())}
