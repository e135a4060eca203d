"""KeyUpdates and renegotiation of a TLS client, by OpenSSL's own functions, because the module `ssl` has none for
them."""

from __future__ import annotations

import _ssl
import ctypes
import ssl
import sys
from typing import Any, cast

import pytest

_NOT_REQUESTED, _REQUESTED = 0, 1
"""SSL_KEY_UPDATE_REQUESTED: the peer has to send a KeyUpdate in return; SSL_KEY_UPDATE_NOT_REQUESTED: it has not."""
_OFFSET_OF_SSL = 3 * ctypes.sizeof(ctypes.c_void_p)
"""The offset of the pointer in `_ssl._SSLSocket` of CPython: behind the object's head and the socket."""


def send_key_updates(client: ssl.SSLSocket | ssl.SSLObject, number: int, *, requesting: bool = True) -> None:
    """Send ``number`` KeyUpdates, each of which requests one in return if ``requesting``. Skips the test if this
    Python's OpenSSL is not found."""
    library = _library()
    tls = _tls(client)
    for _ in range(number):
        assert library.SSL_key_update(tls, _REQUESTED if requesting else _NOT_REQUESTED) == 1
        if library.SSL_do_handshake(tls) != 1:  # the connection has ended
            return


def renegotiate(client: ssl.SSLSocket | ssl.SSLObject) -> None:
    """Send a ClientHello on an established connection of TLS 1.2. Skips the test as above."""
    library = _library()
    assert library.SSL_renegotiate(_tls(client)) == 1
    library.SSL_do_handshake(_tls(client))


def _tls(client: ssl.SSLSocket | ssl.SSLObject) -> ctypes.c_void_p:
    inner = cast(Any, client)._sslobj
    return ctypes.c_void_p.from_address(id(inner) + _OFFSET_OF_SSL)


def _library() -> ctypes.CDLL:
    """The extension module `_ssl`. A function that is looked up in the module comes from its own OpenSSL, even if the
    process has loaded another one."""
    if sys.implementation.name != "cpython" or not hasattr(_ssl, "__file__"):
        pytest.skip("the OpenSSL of this Python is not found")
    return ctypes.CDLL(_ssl.__file__)
