"""Settings that can be replaced while the server runs: each is read again, checked and applied separately.

If one bad file made the whole reload fail, it would block the others: a certificate whose key is written a second later
would delay the replacement of a leaked API key. So a setting that cannot be used keeps its last good value, and this is
logged; all other settings are applied.

Each setting is read in a thread of its own, for which the end of the process does not wait. So a disk that hangs delays
neither the event loop nor the other settings.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum
from typing import Any

from pydantic import SecretStr

from definition_server.control_plane.tls_reader import read_tls_files
from definition_server.environment import Check, SettingsError, load_settings, named_file, variables
from definition_server.ipc.tls_files import TlsFiles
from definition_server.observability.logs import get_logger
from definition_server.settings import Settings

log = get_logger(__name__)

_READ_SECONDS = 10.0


class Reloadable(Enum):
    """The secrets that can be replaced, each with the fields of `Settings` that hold it."""

    DATABASE_URL = ("database_url",)
    API_KEYS = ("api_key", "api_keys")
    SIGNING_KEY = ("avap_internal_key", "avap_internal_key_previous")
    CERTIFICATE = ("tls_cert_file", "tls_key_file", "tls_client_ca_file")

    @property
    def variables(self) -> str:
        """The names of its settings, for the log."""
        return ", ".join(_variable(name) for name in self.value)


_Found = tuple[Settings, TlsFiles | None] | SettingsError
Apply = Callable[[Reloadable, Settings], Awaitable[None]]


class Reloader:
    """Holds the settings in use, and renews them. ``settings`` and ``tls`` have the values that were read at the
    start.
    """

    def __init__(self, settings: Settings, checks: Mapping[str, Check], tls: TlsFiles | None = None) -> None:
        self.settings = settings
        """The settings in use. Each secret has its last usable value."""
        self.tls = tls
        """The content that the TLS files had when they were last usable; None without TLS."""
        self._checks = checks
        self._reading: set[Reloadable] = set()

    async def read_again(self, apply: Apply) -> None:
        """Read again all values that come from files. Call ``apply`` for each usable value as soon as it was read."""
        wanted = [what for what in Reloadable if self._from_files(what)]
        await asyncio.gather(*(self._read_one(what, apply) for what in wanted))

    async def _read_one(self, what: Reloadable, apply: Apply) -> None:
        if what in self._reading:
            return self._keep(what, "the previous reading has not ended")
        try:
            found = self._begin(what)
        except RuntimeError as fault:
            return self._keep(what, f"no thread can be started: {fault}")
        done, _ = await asyncio.wait((found,), timeout=_READ_SECONDS)
        if not done:
            found.add_done_callback(_discard)
            return self._keep(what, f"it was not read within {_READ_SECONDS:g} s; does a disk hang?")
        result = found.result()
        if isinstance(result, SettingsError):
            for problem in result.problems:
                self._keep(what, f"{problem.variable}: {problem.reason}", remedy=problem.remedy)
            return None
        settings, tls = result
        self.settings = self.settings.model_copy(update={name: getattr(settings, name) for name in what.value})
        replaced = None
        if tls is not None:
            replaced, self.tls = self.tls, tls
        await apply(what, self.settings)
        if replaced is not None:
            replaced.close()
        log.info("Settings read again", what=what.variables)
        return None

    def _keep(self, what: Reloadable, error: str, *, remedy: str | None = None) -> None:
        more = {} if remedy is None else {"remedy": remedy}
        log.error("Settings not read again; the old ones stay", what=what.variables, error=error, **more)

    def _begin(self, what: Reloadable) -> asyncio.Future[_Found]:
        """Read the setting ``what`` again in a thread. All other settings keep their values.

        Raises:
            RuntimeError: if no thread can be started.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Future[_Found] = loop.create_future()
        others = {
            _variable(name): _text(getattr(self.settings, name))
            for other in Reloadable
            if other is not what
            for name in other.value
        }

        def end(result: _Found) -> None:
            self._reading.discard(what)
            found.set_result(result)

        def read() -> None:
            try:
                loop.call_soon_threadsafe(end, self._load(what, others))
            except RuntimeError:
                return  # the loop has ended

        threading.Thread(target=read, name=f"reload-{what.name.lower()}", daemon=True).start()
        self._reading.add(what)  # `end` runs in this loop, so it is called later
        return found

    def _load(self, what: Reloadable, others: Mapping[str, str | None]) -> _Found:
        try:
            settings = load_settings(Settings, defaults=None, checks=self._checks, **others)
            return settings, read_tls_files(settings) if what is Reloadable.CERTIFICATE else None
        except SettingsError as error:
            return error

    def _from_files(self, what: Reloadable) -> bool:
        """Whether the setting can have changed. A value from the environment cannot, because the environment of a
        running process does not change.
        """
        if what is Reloadable.CERTIFICATE:
            return self.settings.tls_cert_file is not None
        return any(named_file(_variable(name)) for name in what.value)


def _discard(found: asyncio.Future[_Found]) -> None:
    """Close the TLS files that were read too late."""
    result = found.result()
    if not isinstance(result, SettingsError) and result[1] is not None:
        result[1].close()


def _variable(name: str) -> str:
    return variables(Settings.model_fields[name])[0]


def _text(value: Any) -> str | None:
    """A value in the form in which settings can be overridden. It is None for the path of a certificate, so that the
    file is checked only when it is read again.
    """
    return value.get_secret_value() if isinstance(value, SecretStr) else None
