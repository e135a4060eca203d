"""Reads the TLS files of the settings once, and checks the content that was read, because the files may change
meanwhile.
"""

from __future__ import annotations

from pathlib import Path

from definition_server.environment import Problem, SettingsError, remedy, variables
from definition_server.ipc.tls_files import TlsFiles
from definition_server.settings import Settings
from definition_server.tls_checks import check_certificates, check_pair

_PAIR = ("tls_cert_file", "tls_key_file")
_AUTHORITIES = "tls_client_ca_file"


def read_tls_files(settings: Settings) -> TlsFiles | None:
    """The present content of the TLS files, as memory that the caller closes; None without TLS.

    Raises:
        SettingsError: if the files cannot be read, cannot be kept in memory, or do not belong together.
    """
    if settings.tls_cert_file is None:
        return None
    names = _PAIR if settings.tls_client_ca_file is None else (*_PAIR, _AUTHORITIES)
    contents = [_octets(settings, name) for name in names]
    try:
        files = TlsFiles.seal(*contents)
    except OSError as error:
        raise _refusal(settings, names[0], f"it cannot be kept in memory ({error.strerror})") from None
    try:
        _judge(settings, files)
    except BaseException:
        files.close()
        raise
    return files


def _octets(settings: Settings, name: str) -> bytes:
    path: Path = getattr(settings, name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refusal(settings, name, f"it cannot be read ({error.strerror})") from None


def _judge(settings: Settings, files: TlsFiles) -> None:
    name = _PAIR[0]
    try:
        check_certificates(Path(files.certificate))
        name = _PAIR[1]
        check_pair(Path(files.certificate), Path(files.key), "TLS_CERT_FILE and TLS_KEY_FILE")
        name = _AUTHORITIES
        if files.client_authorities is not None:
            check_certificates(Path(files.client_authorities))
    except ValueError as error:
        raise _refusal(settings, name, str(error)) from None


def _refusal(settings: Settings, name: str, reason: str) -> SettingsError:
    field = Settings.model_fields[name]
    return SettingsError([Problem(variables(field)[0], str(getattr(settings, name)), reason, remedy(field))])
