"""Calls to the server at a control socket, and the options that all operator's commands have."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import click
import grpc
from google.protobuf.message import Message

from definition_server.cli.client_settings import ControlSettings
from definition_server.cli.exits import CommandFailed, Exit, no_traceback, settings_or_exit, visible
from definition_server.cli.reference import settings_epilog
from definition_server.rpc import avap_control_pb2_grpc as pb_grpc

Command = TypeVar("Command", bound=Callable[..., None])

EPILOG = settings_epilog(ControlSettings)
"""The end of the help of each of these commands."""

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.default_authority", "localhost"),
)


class Master:
    """The server at a control socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self._timeout = timeout

    def call(self, method: str, request: Message, timeout: float | None = None) -> Any:
        """The answer of one method.

        Raises:
            CommandFailed: if there is no answer.
        """
        with self._stub() as stub:
            return getattr(stub, method)(request, timeout=timeout or self._timeout)

    def stream(self, method: str, request: Message) -> Iterator[Any]:
        """The answers of a streaming method, as they arrive.

        Raises:
            CommandFailed: if the call fails.
        """
        with self._stub() as stub:
            yield from getattr(stub, method)(request, timeout=max(self._timeout, 3600.0))

    @contextmanager
    def _stub(self) -> Iterator[Any]:
        self._check_socket()
        try:
            # gRPC reads a URI: it would cut an unquoted path at a "?" and take "%41" for an "A".
            target = f"unix:{quote(os.fsencode(self.path))}"
            with grpc.insecure_channel(target, options=_CHANNEL_OPTIONS) as channel:
                yield pb_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]  # generated code
        except grpc.RpcError as error:
            raise self._failure(cast("grpc.Call", error)) from None

    def _check_socket(self) -> None:
        """Refuse a path that is not a socket, or belongs to another account: another program might answer there."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise self._no_server("there is no such file") from None
        except PermissionError:
            raise CommandFailed(
                f"this command, as uid {os.geteuid()}, may not reach {self.path}. Run it as the server's account",
                Exit.UNAUTHENTICATED,
            ) from None
        except OSError as error:
            raise self._no_server(error.strerror or str(error)) from None
        if not stat.S_ISSOCK(status.st_mode):
            raise CommandFailed(f"{self.path} is not a socket. Set CONTROL_SOCKET, or give --socket", Exit.USAGE)
        if os.geteuid() not in (0, status.st_uid):
            raise CommandFailed(
                f"the server at {self.path} runs as uid {status.st_uid}, and this command as uid {os.geteuid()}. "
                "Run it as the server's account",
                Exit.UNAUTHENTICATED,
            )

    def _no_server(self, reason: str) -> CommandFailed:
        return CommandFailed(
            f"no server answers at {self.path.absolute()}: {reason}. Start it, or name the socket that its log line "
            '"Control socket open" shows: with --socket, or with the server\'s CONTROL_SOCKET or SNAPSHOT_DIR',
            Exit.UNAVAILABLE,
        )

    def _failure(self, call: grpc.Call) -> CommandFailed:
        cause = visible(call.details() or "no reason given")
        match call.code():
            case grpc.StatusCode.NOT_FOUND:
                return CommandFailed(cause, Exit.NOT_FOUND)
            case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
                return CommandFailed(cause, Exit.FAILED)
            case grpc.StatusCode.INVALID_ARGUMENT:
                return CommandFailed(cause, Exit.USAGE)
            case grpc.StatusCode.UNIMPLEMENTED:
                return CommandFailed(
                    f"the server at {self.path} does not know this command: it is older than this program",
                    Exit.FAILED,
                )
            case grpc.StatusCode.PERMISSION_DENIED:
                return CommandFailed(f"the server at {self.path} refuses: {cause}", Exit.UNAUTHENTICATED)
            case grpc.StatusCode.UNAVAILABLE if "may not control" in cause:
                return CommandFailed(f"the server at {self.path} refuses: {cause}", Exit.UNAUTHENTICATED)
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return CommandFailed(
                    f"no answer at {self.path} within the time of --timeout: the master is stopped or busy (its /livez "
                    "and its log say more). A command that changes something may still take effect",
                    Exit.UNAVAILABLE,
                )
            case _:
                return self._no_server(cause.rstrip("."))


def _carry_over(command: Command, run: Callable[..., None]) -> None:
    """Give ``run`` the documentation, the name and click's options of ``command``, in whose place it is called."""
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]  # click's mark


def control_options(timeout: float) -> Callable[[Command], Command]:
    """The options ``--json``, ``--socket`` and ``--timeout``. In place of the last two, the command gets ``master``."""

    def add(command: Command) -> Command:
        def run(*, socket: Path | None, timeout: float, **others: Any) -> None:
            command(master=master_at(socket, timeout), **others)

        _carry_over(command, run)
        return cast("Command", server_options(timeout)(run))

    return add


def server_options(timeout: float) -> Callable[[Command], Command]:
    """The options ``--json`` (``as_json``), ``--socket`` and ``--timeout``, which the command gets as its arguments."""

    def add(command: Command) -> Command:
        def run(**options: Any) -> None:
            with no_traceback():
                command(**options)

        _carry_over(command, run)
        for option in (
            click.option("--json", "as_json", is_flag=True, help="Print JSON."),
            click.option("--socket", type=click.Path(path_type=Path), help="Socket, in place of CONTROL_SOCKET."),
            click.option(
                "--timeout",
                type=click.FloatRange(min=0, min_open=True, max=86_400),
                metavar="SECONDS",
                default=timeout,
                show_default=True,
                help="Longest wait for the answer.",
            ),
        ):
            run = option(run)
        return cast("Command", run)

    return add


def master_at(socket: Path | None, timeout: float) -> Master:
    """The server at ``socket``, or at the socket that the environment names. Raises as `socket_path` does."""
    return Master(socket_path(socket), timeout)


def socket_path(given: Path | None) -> Path:
    """The socket to call: ``given``, or the one that the environment names.

    Raises:
        CommandFailed: if neither ``given`` nor the environment names a socket.
    """
    path = given or settings_or_exit(ControlSettings).control_path()
    if path is None:
        raise CommandFailed(
            "which server? Set SNAPSHOT_DIR or CONTROL_SOCKET as the server has it, or give --socket", Exit.CONFIG
        )
    return path
