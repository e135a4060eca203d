"""Opens the port and raises the descriptor limit, before any worker is started."""

from __future__ import annotations

import errno
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from definition_server.observability.logs import get_logger
from grpc_h2 import BACKLOG, set_listening_options

log = get_logger(__name__)

WANTED_DESCRIPTORS = 65_536
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_RETRY_SECONDS = 2.0
_RETRY_EVERY = 0.1


class PortInUse(Exception):
    """The address is in use, or is not an address of this machine. The message gives the reason and the remedy."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host:port``. Workers inherit it and accept from it.

    The port is open while this process or a worker has the socket open: a connection that arrives while all workers are
    down waits for the next one. With ``SO_REUSEADDR`` sockets in TIME_WAIT do not block the port (``socket(7)``); a
    second listener is refused nevertheless, so two masters cannot share a port. As in `reserve_port`, the attempt is
    repeated for two seconds.

    Raises:
        PortInUse: if the address cannot be opened.
    """
    return _bound(host, port, _open)


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket that reserves ``host:port``: only the workers of this master can listen there.

    Used for a transport that cannot use an inherited listening socket. ``SO_REUSEPORT`` alone would silently allow a
    second master of the same user to listen too. So the socket binds first *without* that option, which fails if
    another process listens there, and sets it afterwards: Linux checks the current option of both sockets at each bind
    (``net/ipv4/inet_connection_sock.c``, ``inet_csk_bind_conflict``). ``SO_REUSEADDR`` is set for the bind, so that
    connections of an earlier server in TIME_WAIT do not block it, and cleared afterwards, so that the bind of a second
    master fails even before the first worker listens. This socket itself never listens.

    The workers of a master that was killed need a moment to close the port, so the bind is retried for two seconds.

    Raises:
        PortInUse: if the address cannot be opened.
    """
    return _bound(host, port, _share_with_workers)


def listens(listener: socket.socket) -> bool:
    """Whether the socket still listens: any process that shares it may end this by ``shutdown(2)``.

    A socket that is closed in this process counts as listening.
    """
    return listener.fileno() < 0 or bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def listen_again(listener: socket.socket, address: Any) -> None:
    """Make a socket of `listen` that was shut down listen again, for every process that shares it.

    Connections that waited to be accepted have been reset.

    Raises:
        OSError: if another process has taken the port meanwhile.
    """
    with suppress(OSError):  # EINVAL: it is still bound, unless the kernel chose its port
        listener.bind(address)
    listener.listen(BACKLOG)


def _open(made: socket.socket) -> None:
    set_listening_options(made)  # workers in the jail cannot set these options
    made.listen(BACKLOG)


def _share_with_workers(holder: socket.socket) -> None:
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)


def _bound(host: str, port: int, complete: Callable[[socket.socket], None]) -> socket.socket:
    """A socket bound to ``host:port``, after ``complete`` was called with it.

    ``::`` is every address, IPv4 included, whatever ``net.ipv6.bindv6only`` says; on a machine without IPv6 it is every
    IPv4 address.
    """
    host = host.removeprefix("[").removesuffix("]")
    deadline = time.monotonic() + _RETRY_SECONDS
    while True:
        try:
            try:
                return _bound_once(host, port, complete)
            except OSError as error:
                if host != "::" or error.errno not in _NO_IPV6:
                    raise
                return _bound_once("0.0.0.0", port, complete)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise PortInUse(reason_text(host, port, "PORT", error)) from error
            time.sleep(_RETRY_EVERY)


def _bound_once(host: str, port: int, complete: Callable[[socket.socket], None]) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in host:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.bind((host, port))
        complete(made)
    except OSError:
        made.close()
        raise
    return made


def reason_text(host: str, port: int, variable: str, error: OSError) -> str:
    """The reason why ``host:port`` cannot be opened, and the remedy."""
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{shown} is in use by another process (another definition-server?). "
            f"Stop it, or set {variable} to a free port."
        )
    if error.errno == errno.EACCES:
        return f"{shown} may not be opened by this user. Set {variable} to a port from 1024 up."
    address = "HOST" if variable == "PORT" else "METRICS_HOST"
    failed = f"{shown} cannot be opened ({error.strerror})"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{failed}: this machine has no such address. Set {address} to one that `ip address` lists, or to :: for "
            "all addresses."
        )
    if error.errno == errno.EAFNOSUPPORT:
        return f"{failed}: this machine has no IPv6. Set {address} to an IPv4 address, or to :: for all addresses."
    if isinstance(error, socket.gaierror) or error.errno == errno.EINVAL:
        return f"{failed}. Set {address} to an IP address of this machine, or to :: for all addresses."
    return f"{failed}. Check {address} and {variable}."


def raise_descriptor_limit(wanted: int = WANTED_DESCRIPTORS) -> int:
    """Raise the soft limit of open files to at least ``wanted``. Log if the limit cannot be raised.

    Returns:
        The effective limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    for limit in ((wanted, max(hard, wanted) if hard != resource.RLIM_INFINITY else hard), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            break
        except (ValueError, OSError):
            continue
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft < wanted:
        log.warning(
            "Limit of open files is low; connections beyond it will be refused",
            limit=soft,
            wanted=wanted,
            remedy="raise it (ulimit -n, LimitNOFILE=, or the container runtime's nofile)",
        )
    return soft
