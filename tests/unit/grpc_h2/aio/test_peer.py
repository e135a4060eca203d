"""The text of a peer's address, in the form that gRPC uses."""

from __future__ import annotations

import pytest

from grpc_h2.aio.peer import peer_text


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("192.0.2.1", 4711), "ipv4:192.0.2.1:4711"),
        (("2001:db8::1", 4711, 0, 0), "ipv6:%5B2001:db8::1%5D:4711"),
        (("::ffff:192.0.2.1", 4711, 0, 0), "ipv4:192.0.2.1:4711"),
        (("::ffff:c000:201", 4711, 0, 0), "ipv6:%5B::ffff:c000:201%5D:4711"),
        (("64:ff9b::192.0.2.1", 4711, 0, 0), "ipv6:%5B64:ff9b::192.0.2.1%5D:4711"),
        ("", "unix:"),
        ("/run/socket", "unix:"),
        (None, "unix:"),
        (("only",), "unix:"),
    ],
    ids=str,
)
def test_the_text_of_a_peer_has_the_form_of_its_address_family(address: object, text: str) -> None:
    assert peer_text(address) == text
