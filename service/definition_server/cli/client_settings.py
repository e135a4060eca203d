"""The settings of the commands that call a server: as a client, or on its control socket."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from definition_server.environment import EnvironmentSettings, advice
from definition_server.setting_types import SOCKET_REMEDY, ApiKey, Port
from definition_server.settings import control_path
from definition_server.tls_checks import check_certificates, check_pair, check_regular


class ClientSettings(EnvironmentSettings):
    """The settings of the client commands (``get``, ``fetch``, ``health``)."""

    host: str = Field(
        "127.0.0.1",
        validation_alias="DEFINITION_SERVER_HOST",
        description="Host that the client commands call.",
        json_schema_extra=advice("Give a host name or an IP address"),
    )
    port: Port = Field(
        50051,
        validation_alias="PORT",
        description="gRPC port that the client commands call.",
        json_schema_extra=advice("Give a number from 1 to 65535"),
    )
    api_key: ApiKey | None = Field(
        None,
        validation_alias="API_KEY",
        description="Key sent as metadata `x-avap-auth`.",
        json_schema_extra=advice("Set it to the server's API_KEY", secret=True),
    )
    ca_file: Literal["system"] | Path | None = Field(
        None,
        union_mode="left_to_right",
        validation_alias="DEFINITION_SERVER_CA_FILE",
        description="PEM file of the authorities that verify the server's certificate: call over TLS. "
        "`system`: this machine's authorities. Unset: cleartext.",
        json_schema_extra=advice("Name a readable PEM file, give system, or leave it unset"),
    )
    client_cert_file: Path | None = Field(
        None,
        validation_alias="DEFINITION_SERVER_CLIENT_CERT_FILE",
        description="PEM file of the certificate chain for a server that demands a client certificate.",
        json_schema_extra=advice("Name a readable PEM file and set DEFINITION_SERVER_CLIENT_KEY_FILE, or unset both"),
    )
    client_key_file: Path | None = Field(
        None,
        validation_alias="DEFINITION_SERVER_CLIENT_KEY_FILE",
        description="PEM file of that certificate's private key.",
        json_schema_extra=advice(
            "Name the readable PEM file of the key that belongs to DEFINITION_SERVER_CLIENT_CERT_FILE, or unset both"
        ),
    )

    @field_validator("host")
    @classmethod
    def _check_host(cls, value: str) -> str:
        if ":" in value:
            try:
                return str(ipaddress.IPv6Address(value.removeprefix("[").removesuffix("]")))
            except ValueError:
                raise ValueError("it is not an IPv6 address, and a port is given by --port (PORT)") from None
        return value

    @field_validator("ca_file")
    @classmethod
    def _check_authorities(cls, value: Literal["system"] | Path | None) -> Literal["system"] | Path | None:
        if isinstance(value, Path):
            check_regular(value)
            check_certificates(value)
        return value

    @field_validator("client_cert_file")
    @classmethod
    def _check_certificate(cls, value: Path | None) -> Path | None:
        if value is not None:
            check_regular(value)
            check_certificates(value)
        return value

    @field_validator("client_key_file")
    @classmethod
    def _check_key(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "client_cert_file" not in info.data:
            return value  # the problem was reported already
        check_regular(value)
        names = "DEFINITION_SERVER_CLIENT_CERT_FILE and DEFINITION_SERVER_CLIENT_KEY_FILE"
        check_pair(info.data["client_cert_file"], value, names)
        if value is not None and info.data.get("ca_file", value) is None:
            raise ValueError("it needs DEFINITION_SERVER_CA_FILE, without which the server is called in cleartext")
        return value


class ControlSettings(EnvironmentSettings):
    """The settings of the operator's commands (``status``, ``history``, ``accept`` …). They have the same names as the
    server's settings."""

    control_socket: Path | None = Field(
        None,
        validation_alias="CONTROL_SOCKET",
        description="Unix socket of the server. Unset: `control.sock` in `SNAPSHOT_DIR`.",
        json_schema_extra=advice(SOCKET_REMEDY),
    )
    snapshot_dir: Path | None = Field(
        None,
        validation_alias="SNAPSHOT_DIR",
        description="The server's directory of snapshots, which has its socket unless `CONTROL_SOCKET` is set.",
        json_schema_extra=advice("Give the directory that the server has, or leave it unset"),
    )

    def control_path(self) -> Path | None:
        """The path of the control socket; None: neither variable is set."""
        return control_path(self.control_socket, self.snapshot_dir)
