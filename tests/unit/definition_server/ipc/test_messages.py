"""The defaults of the fields of messages, and which reports of calls are plausible."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import MISSING, fields

import pytest

from definition_server.ipc import channel
from definition_server.ipc.messages import (
    FROM_MASTER,
    FROM_WORKER,
    CallsSampled,
    Configure,
    Drain,
    Freshness,
    KeysUsed,
    Message,
    MessageError,
    decode,
    encode,
)
from definition_server.ipc.stats import METHODS, STATUSES


def test_by_default_a_worker_has_no_limits_no_jail_and_reports_no_calls() -> None:
    defaults = {each.name: each.default for each in fields(Configure) if each.default is not MISSING}
    assert defaults == {
        "max_connections": 0, "max_connections_per_peer": 0, "max_connection_idle_seconds": 0.0,
        "keepalive_time_seconds": 7200.0, "keepalive_timeout_seconds": 20.0, "keepalive_min_time_seconds": 10.0,
        "jail": "off", "version_metadata": True, "trace_one_call_in": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("calls", "plausible"),
    [
        (CallsSampled((), (), (), ()), True),
        (CallsSampled((len(METHODS) - 1,), (len(STATUSES) - 1,), (7,), (7,)), True),
        (CallsSampled((len(METHODS),), (0,), (7,), (7,)), False),
        (CallsSampled((0,), (len(STATUSES),), (7,), (7,)), False),
        (CallsSampled((0,), (0,), (7,), (8,)), False),
        (CallsSampled((0, 0), (0, 0), (7, 7), (7, 8)), False),
        (CallsSampled((0, 0), (0,), (7,), (7,)), False),
        (CallsSampled((0,), (0, 0), (7,), (7,)), False),
        (CallsSampled((0,), (0,), (7, 7), (7,)), False),
        (CallsSampled((0,), (0,), (7,), (7, 7)), False),
    ],
    ids=["none", "the last of each", "method", "status", "time", "second time", "1", "2", "3", "4"],
)
def test_a_report_of_calls_is_plausible_if_its_lists_agree_and_its_indices_exist(
    calls: CallsSampled, plausible: bool
) -> None:
    assert calls.plausible is plausible


def test_a_partly_received_descriptor_is_treated_as_missing() -> None:
    whole = b"".join(number.to_bytes(4, sys.byteorder) for number in (7, 8))
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    assert channel._descriptors([(*rights, whole)]) == (7, 8)
    for extra in (1, 2, 3):
        assert channel._descriptors([(*rights, whole + b"\0" * extra)]) == (7, 8)
    assert channel._descriptors([(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, whole)]) == ()


MOST_TEXT, MOST_ITEMS, MOST_INTEGER = 4096, 256, 2**64 - 1


def sampled(**lists: object) -> bytes:
    """A report of calls whose sender does not keep to the types."""
    return json.dumps({"type": "CallsSampled"} | {each.name: [0] for each in fields(CallsSampled)} | lists).encode()


@pytest.mark.parametrize(
    "message",
    [
        KeysUsed(("x" * MOST_TEXT,)),
        KeysUsed(("x",) * MOST_ITEMS),
        CallsSampled((MOST_INTEGER,), (0,), (0,), (0,)),
        CallsSampled(*[(0,) * MOST_ITEMS] * 4),
    ],
    ids=["text", "texts", "integer", "integers"],
)
def test_a_message_of_the_maximum_size_is_decoded(message: Message) -> None:
    assert decode(encode(message), FROM_WORKER) == message


@pytest.mark.parametrize(
    "datagram",
    [
        encode(KeysUsed(("x" * (MOST_TEXT + 1),))),
        encode(KeysUsed(("x",) * (MOST_ITEMS + 1))),
        b'{"type": "KeysUsed", "digests": "x"}',
        b'{"type": "KeysUsed", "digests": [1]}',
        sampled(methods=[0] * (MOST_ITEMS + 1)),
        sampled(methods=[MOST_INTEGER + 1]),
        sampled(methods=[-1]),
        sampled(methods=[True]),
        sampled(methods=["0"]),
        sampled(methods={"0": 0}),
        sampled(methods=0),
    ],
    ids=[
        "long text", "many texts", "text for a list", "number for a text", "many numbers", "large", "negative",
        "boolean", "text for a number", "object", "number for a list",
    ],
)  # fmt: skip
def test_a_message_with_a_value_above_a_limit_or_of_another_type_is_refused(datagram: bytes) -> None:
    with pytest.raises(MessageError, match="not a control message"):
        decode(datagram, FROM_WORKER)


def drain(**values: object) -> bytes:
    """An order to drain whose sender does not keep to the types."""
    order = {"type": "Drain", "announce": True, "wait_seconds": 0.5, "timeout_seconds": 2.0}
    return json.dumps(order | values).encode()


def test_a_time_is_any_number_and_is_decoded_as_a_float() -> None:
    message = decode(drain(wait_seconds=3, timeout_seconds=-1), FROM_MASTER)
    assert message == Drain(True, 3.0, -1.0)
    assert isinstance(message, Drain)
    assert {type(message.wait_seconds), type(message.timeout_seconds)} == {float}


@pytest.mark.parametrize("value", [True, "1", None, [1.0], {}, 10**400], ids=str)
def test_only_a_finite_number_is_accepted_as_a_time(value: object) -> None:
    with pytest.raises(MessageError, match="not a control message"):
        decode(drain(wait_seconds=value), FROM_MASTER)


@pytest.mark.parametrize("value", [0, 1, "true", None, []], ids=str)
def test_a_boolean_field_accepts_only_true_and_false(value: object) -> None:
    for said in (True, False):
        assert decode(encode(Freshness(said)), FROM_MASTER) == Freshness(said)
    with pytest.raises(MessageError, match="neither true nor false"):
        decode(json.dumps({"type": "Freshness", "fresh": value}).encode(), FROM_MASTER)


@pytest.mark.parametrize("fields_given", [{}, {"digests": [], "more": 1}, {"more": 1}], ids=["none", "more", "others"])
def test_a_message_has_exactly_the_fields_of_its_type(fields_given: dict[str, object]) -> None:
    with pytest.raises(MessageError, match="its fields are not those of its type"):
        decode(json.dumps({"type": "KeysUsed"} | fields_given).encode(), FROM_WORKER)


def test_a_refusal_quotes_the_first_120_octets() -> None:
    datagram = bytes(range(97, 123)) * 10
    with pytest.raises(MessageError) as refused:
        decode(datagram, FROM_WORKER)
    assert repr(datagram[:120]) in str(refused.value)
    assert repr(datagram[:121])[:-1] not in str(refused.value)
