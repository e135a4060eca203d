"""The types of settings: the values that `settings` and `cli.client_settings` allow.

This module checks single values. Relations between settings are checked where the settings are declared.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from definition_server.api_keys import key_fault
from definition_server.tls_checks import Pem, check_pem

MOST_WORKERS = 512
SOCKET_REMEDY = "Give a path of at most 107 octets in a directory that the server may write to, or leave it unset"
SECONDS_REMEDY = "Give a number of seconds, fractions allowed, for example {}"


def _check_api_key(value: SecretStr) -> SecretStr:
    """Refuse a value that a header cannot carry."""
    fault = key_fault(value.get_secret_value())
    if fault is not None:
        raise ValueError(fault)
    return value


def _check_ip_address(value: str) -> str:
    try:
        ip_address(value.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError("it is not an IP address") from None
    return value


def _check_http_url(value: str) -> str:
    if not value.lower().startswith(("http://", "https://")):
        raise ValueError("it is not an HTTP URL")
    return value


def _check_postgres_url(value: SecretStr) -> SecretStr:
    # libpq checks the rest of the URL: `control_plane.postgres.url_fault`.
    scheme, separator, _ = value.get_secret_value().partition("://")
    if not separator or scheme not in ("postgresql", "postgres"):
        lower = separator and scheme.lower() in ("postgresql", "postgres")
        raise ValueError("the scheme must be postgresql://" + (", in small letters" if lower else ""))
    return value


def _check_certificate(value: Path) -> Path:
    check_pem(value, Pem.CERTIFICATE)
    return value


Port = Annotated[int, Field(ge=0, le=65535)]
Workers = Annotated[int, Field(ge=1, le=MOST_WORKERS)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Growth = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
"""The type of a growth in percent."""
ApiKey = Annotated[SecretStr, AfterValidator(_check_api_key)]
IpAddress = Annotated[str, AfterValidator(_check_ip_address)]
HttpUrl = Annotated[str, AfterValidator(_check_http_url)]
PostgresUrl = Annotated[SecretStr, AfterValidator(_check_postgres_url)]
CertificateFile = Annotated[Path, AfterValidator(_check_certificate)]
"""The type of a path to a PEM file with at least one certificate."""
