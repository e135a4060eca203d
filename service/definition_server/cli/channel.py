"""The server that a client command calls: its options, the channel, one call, and the report of a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import click
import grpc
from google.protobuf.message import Message

from definition_server.api_keys import METADATA_KEY
from definition_server.cli.client_settings import ClientSettings
from definition_server.cli.exits import CommandFailed, Exit, settings_or_exit, unusable_environment, visible
from definition_server.cli.tls import Tls, advice, tls_of
from definition_server.environment import Problem

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # a catalogue easily exceeds the default of 4 MiB
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),  # http_proxy is for web traffic; these ports are internal
    ("grpc.use_local_subchannel_pool", 1),  # a new channel connects at once, without an earlier one's back-off
)

Command = TypeVar("Command", bound=Callable[..., None])
Answer = TypeVar("Answer", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Server:
    """The server to call: its address, the key, the longest wait for an answer (seconds), and TLS (None: cleartext)."""

    address: str
    api_key: str | None
    timeout: float
    tls: Tls | None

    def open_channel(self) -> grpc.Channel:
        """Open a channel. The caller closes it."""
        if self.tls is None:
            return grpc.insecure_channel(self.address, options=_CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(self.tls.authorities, self.tls.key, self.tls.certificate)
        return grpc.secure_channel(self.address, credentials, options=_CHANNEL_OPTIONS)

    def call(self, method: str, request: Message, answer: type[Answer]) -> Answer:
        """Call ``method`` of ``avap.DefinitionEngine``.

        Raises:
            CommandFailed: if the call fails, or there is no key (exit code 78).
        """
        return self._call(method, request, answer.FromString)

    def call_raw(self, method: str, request: Message) -> bytes:
        """Like `call`, but returns octets: a large answer takes a third of the memory that its objects would."""
        return self._call(method, request, bytes)

    def _call(self, method: str, request: Message, read: Callable[[bytes], T]) -> T:
        if self.api_key is None:
            remedy = "Set it to the server's API_KEY, or API_KEY_FILE to a file that holds it"
            raise unusable_environment([Problem("API_KEY", None, "it is required", remedy)])
        try:
            with self.open_channel() as channel:
                callable_ = channel.unary_unary(
                    f"/avap.DefinitionEngine/{method}",
                    request_serializer=type(request).SerializeToString,
                    response_deserializer=read,
                )
                answer: T = callable_(request, timeout=self.timeout, metadata=((METADATA_KEY, self.api_key),))
                return answer
        except grpc.RpcError as error:
            raise self.failure(error) from None

    def failure(self, error: grpc.RpcError) -> CommandFailed:
        """The report of ``error``: the address, the cause and, if one is known, a remedy."""
        call = cast("grpc.Call", error)
        cause = visible(call.details() or "no reason given")
        match call.code():
            case grpc.StatusCode.NOT_FOUND:
                remedy = "A name is exact, capitals too; `definition-server fetch --out DIR` writes all that are served"
                return CommandFailed(f"{cause}. {remedy}", Exit.NOT_FOUND)
            case grpc.StatusCode.UNAUTHENTICATED:
                text = f"the key was refused by {self.address} ({cause}); set API_KEY to the server's key"
                return CommandFailed(text, Exit.UNAUTHENTICATED)
            case grpc.StatusCode.UNAVAILABLE:
                remedy = advice(cause, self.tls) or (
                    "Check that the server runs and is ready, and that --host and --port "
                    "(DEFINITION_SERVER_HOST and PORT) name it"
                )
                return CommandFailed(f"{self.address} is unavailable: {cause.rstrip('.')}. {remedy}", Exit.UNAVAILABLE)
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                text = (
                    f"no answer from {self.address} within {self.timeout:g} s ({cause}). Check that the address "
                    "is right and the server is not overloaded, or allow more with --timeout"
                )
                return CommandFailed(text, Exit.UNAVAILABLE)
            case code:
                return CommandFailed(f"{self.address} answered {code.name}: {cause}", Exit.FAILED)


def connection_options(default_timeout: float) -> Callable[[Command], Command]:
    """The options for the server to call: the keyword arguments of `server_of`."""
    seconds = click.FloatRange(min=0, min_open=True, max=86_400)
    options = (
        click.option("--host", help="Host to call, in place of DEFINITION_SERVER_HOST."),
        click.option("--port", type=click.IntRange(1, 65535), help="Port to call, in place of PORT."),
        click.option(
            "--timeout",
            type=seconds,
            metavar="SECONDS",
            default=default_timeout,
            show_default=True,
            help="Longest wait for the answer.",
        ),
        click.option(
            "--ca-file",
            type=click.Path(),
            metavar="FILE",
            help="Call over TLS and trust these authorities, or system; in place of DEFINITION_SERVER_CA_FILE.",
        ),
        click.option(
            "--client-cert-file",
            type=click.Path(),
            metavar="FILE",
            help="Certificate to show, in place of DEFINITION_SERVER_CLIENT_CERT_FILE.",
        ),
        click.option(
            "--client-key-file",
            type=click.Path(),
            metavar="FILE",
            help="Its key, in place of DEFINITION_SERVER_CLIENT_KEY_FILE.",
        ),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def server_of(
    *,
    host: str | None,
    port: int | None,
    timeout: float,
    ca_file: str | None,
    client_cert_file: str | None,
    client_key_file: str | None,
) -> Server:
    """The server that the options name; the environment supplies the missing options.

    Raises:
        CommandFailed: if the options or the environment cannot be used.
    """
    given = {
        "DEFINITION_SERVER_HOST": host,
        "PORT": port,
        "DEFINITION_SERVER_CA_FILE": ca_file,
        "DEFINITION_SERVER_CLIENT_CERT_FILE": client_cert_file,
        "DEFINITION_SERVER_CLIENT_KEY_FILE": client_key_file,
    }
    overrides = {name: str(value) for name, value in given.items() if value}
    settings = settings_or_exit(ClientSettings, defaults=None, checks=None, **overrides)
    name = f"[{settings.host}]" if ":" in settings.host else settings.host
    key = None if settings.api_key is None else settings.api_key.get_secret_value()
    return Server(f"{name}:{settings.port}", key, timeout, tls_of(settings))
