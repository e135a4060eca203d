"""A call without a transport: authentication, answers, counters, and the error that a client gets after a bug."""

from __future__ import annotations

import hmac
from contextlib import suppress
from hashlib import sha256
from time import perf_counter
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.logs import captured_logs, logged
from tests.support.snapshots import published
from tests.support.stats import Pages

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.publisher import Publisher
from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.endpoint import Endpoint
from definition_server.data_plane.failure import CallFailed, Status
from definition_server.data_plane.services import DefinitionEngine
from definition_server.ipc.stats import LATENCY_BOUNDS, STATUSES
from definition_server.rpc import avap_pb2

KEY, OTHER = "key", "the right key after a wrong one"
LET_IN = (("x-avap-auth", KEY),)


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def snapshot(*names: str) -> Snapshot:
    builder = SnapshotBuilder()
    builder.add(Row(number, name.encode(), None, None, name.encode()) for number, name in enumerate(names))
    return Snapshot(builder.build(generation=1, created_at_ns=0).to_bytes())


def engine(*names: str) -> DefinitionEngine:
    made = DefinitionEngine()
    made.snapshot = snapshot(*names)
    return made


def failure(call: object, *arguments: object) -> tuple[Status, str]:
    with pytest.raises(CallFailed) as caught:
        call(*arguments)
    return caught.value.status, caught.value.message


@pytest.fixture
def page() -> Pages:
    return Pages(2)


REFUSED = (Status.UNAUTHENTICATED, "Invalid Credentials")


# -- authentication ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("x-avap-auth", ""),),
        (("x-avap-auth", "wrong"),),
        (("x-avap-auth", KEY + "\0"),),
        (("x-avap-auth", KEY.upper()),),
        (("x-avap-auth", "schlüssel"),),
        (("x-avap-auth", digest(KEY)),),
        (("x-avap-auth", KEY), ("x-avap-auth", KEY)),
        (("x-avap-auth", KEY), ("x-avap-auth", "wrong")),
        (("x-avap-auth-bin", KEY.encode()),),
        (("X-Avap-Auth", KEY),),  # names have no upper case in HTTP/2, so transports never pass any on
        (("x-avap-auth", b"\xfe\xff"),),
        (("authorization", KEY),),
    ],
)
def test_a_call_without_exactly_one_known_key_is_refused(metadata: tuple[tuple[str, str | bytes], ...]) -> None:
    assert failure(KeyRing([digest(KEY)]).authenticate, metadata) == REFUSED


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_any_of_several_known_keys_is_accepted(key: str) -> None:
    KeyRing([digest(KEY), digest(OTHER)]).authenticate((("user-agent", "x"), ("x-avap-auth", key)))


@pytest.mark.parametrize("presented", [KEY, OTHER, "wrong"])
def test_every_known_key_is_compared_whichever_matches(presented: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time must reveal neither which key matched nor whether one did."""
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def noting_compare(digest: bytes, known: bytes) -> bool:
        compared.append(known)
        return compare(digest, known)

    monkeypatch.setattr(hmac, "compare_digest", noting_compare)
    ring = KeyRing([digest(KEY), digest(OTHER), digest("a third")])
    with suppress(CallFailed):
        ring.authenticate((("x-avap-auth", presented),))
    assert len(compared) == 3


@given(st.lists(st.tuples(st.sampled_from(["x-avap-auth", "x-avap-auth-bin", "te"]), st.text() | st.binary())))
def test_any_metadata_without_the_key_is_refused_and_nothing_else_is_raised(
    metadata: list[tuple[str, str | bytes]],
) -> None:
    assert failure(KeyRing([digest("a key that no example hits")]).authenticate, metadata) == REFUSED


def test_a_key_ring_without_keys_refuses_every_call() -> None:
    assert failure(KeyRing().authenticate, LET_IN) == REFUSED


def test_replaced_keys_are_accepted_at_once_and_old_ones_are_refused() -> None:
    ring = KeyRing([digest(KEY)])
    ring.replace([digest(OTHER)])
    assert failure(ring.authenticate, LET_IN) == REFUSED
    ring.authenticate((("x-avap-auth", OTHER),))


# -- answers ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=8, unique=True), st.text(max_size=200))
def test_every_request_is_answered_as_a_protobuf_parser_would_read_it(names: list[str], other: str) -> None:
    names = [name for name in names if name.isprintable()] or ["if"]
    served = engine(*names)
    for name in [*names, other]:
        request = avap_pb2.CommandRequest(name=name).SerializeToString()
        if name in names:
            assert avap_pb2.CommandResponse.FromString(served.get_command(request)).name == name
        else:
            assert failure(served.get_command, request)[0] is Status.NOT_FOUND


@pytest.mark.parametrize(
    ("request_bytes", "name"),
    [
        (b"\x0a\x02if\x12\x01x", "if"),  # a field from a newer contract
        (b"\x0a\x04else\x0a\x02if", "if"),  # the last one counts
        (b"\x12\x01x\x0a\x02if", "if"),
        (b"\x0a\x82\x00if", "if"),  # a length with more octets than necessary
    ],
)
def test_unusual_encodings_of_a_request_are_understood(request_bytes: bytes, name: str) -> None:
    answer = engine("if", "else").get_command(request_bytes)
    assert avap_pb2.CommandResponse.FromString(answer).name == name


@given(st.binary(max_size=40))
def test_any_bytes_give_an_answer_or_a_documented_failure(request_bytes: bytes) -> None:
    status = Status.OK
    try:
        engine("if").get_command(request_bytes)
    except CallFailed as failed:
        status = failed.status
    assert status in (Status.OK, Status.NOT_FOUND, Status.INVALID_ARGUMENT)


FRAGMENTS = st.sampled_from(
    [b"\x0a", b"\x12", b"\x08", b"\x00", b"\x02", b"\x82", b"if", b"else", b"\xff", b"\xc3\xbc"]
)


@given(st.lists(FRAGMENTS, max_size=8).map(b"".join) | st.binary(max_size=200))
@example(b"\x0a\x03i")
@example(b"\x0a\x05i")
@example(b"\x0a\x04if")
@example(b"\x0a\x01if")
@example(b"\x0a\x00if")
@example(b"\x0a\x06\x03if")
@example(b"\x0a\x01\x03if")
@example(b"\x12\x02if")
@example(b"\x0a\x80\x00".ljust(130, b"i"))  # from 128 on, the octet after the tag is not the length
@example(b"\x0a\xff\x01".ljust(257, b"i"))
def test_any_bytes_are_read_exactly_as_a_protobuf_parser_reads_them(request_bytes: bytes) -> None:
    served = engine("if", "else", "ü")
    assert served.snapshot is not None
    expected: bytes | tuple[Status, str] | None
    try:
        name = avap_pb2.CommandRequest.FromString(request_bytes).name
    except DecodeError:
        expected = Status.INVALID_ARGUMENT, "The request is not a valid avap.CommandRequest"
    else:
        expected = served.snapshot.answer(name.encode()) or (Status.NOT_FOUND, f"Command '{name}' not found")
    try:
        got: bytes | tuple[Status, str] = served.get_command(request_bytes)
    except CallFailed as failed:
        got = failed.status, failed.message
    assert got == expected


@pytest.mark.parametrize("length", [1, 127, 128, 199, 200, 201])
def test_the_error_repeats_a_name_of_up_to_200_characters_whole(length: int) -> None:
    request = avap_pb2.CommandRequest(name="é" * length).SerializeToString()
    told = "é" * min(length, 200) + "…" * (length > 200)
    assert failure(engine("if").get_command, request) == (Status.NOT_FOUND, f"Command '{told}' not found")


def test_a_call_that_holds_a_replaced_snapshot_can_still_read_it(page: Pages) -> None:
    publisher, served = Publisher(), DefinitionEngine()
    publisher.publish(published("if"))
    served.snapshot = held = publisher.current.snapshot
    body = held.body
    publisher.publish(published("else", generation=2))
    served.snapshot = publisher.current.snapshot
    publisher.close()
    del held
    assert avap_pb2.CatalogResponse.FromString(bytes(body)).commands[0].name == "if"
    assert served.get_command(b"\x0a\x04else")
    assert failure(served.get_command, b"\x0a\x02if")[0] is Status.NOT_FOUND


def test_a_name_too_long_for_any_catalogue_is_shortened_in_the_message() -> None:
    request = avap_pb2.CommandRequest(name="é" * 100_000).SerializeToString()
    status, message = failure(engine("if").get_command, request)
    assert (status, message) == (Status.NOT_FOUND, f"Command '{'é' * 200}…' not found")


def test_the_whole_catalogue_is_the_snapshots_body() -> None:
    served = engine("if", "else")
    assert served.snapshot is not None
    assert served.sync_catalog(b"") == served.sync_catalog(b"\x12\x01x") == bytes(served.snapshot.body)
    assert failure(served.sync_catalog, b"\xff")[0] is Status.INVALID_ARGUMENT


def test_without_a_snapshot_a_call_is_unavailable() -> None:
    for call in (DefinitionEngine().get_command, DefinitionEngine().sync_catalog):
        assert failure(call, b"") == (Status.UNAVAILABLE, "The catalogue is not loaded yet")


# -- counters ---------------------------------------------------------------------------------------------------------


def test_every_call_is_counted_by_its_outcome_and_in_its_own_slot(page: Pages) -> None:
    served = engine("if")
    endpoint = Endpoint(served, KeyRing([digest(KEY)]), page.slot(1))
    get, sync = endpoint.handlers["GetCommand"], endpoint.handlers["SyncCatalog"]
    get(b"\x0a\x02if", LET_IN)
    sync(b"", LET_IN)
    for request, metadata in ((b"\x0a\x02no", LET_IN), (b"\x0a\x02if", ()), (b"\xff", LET_IN)):
        failure(get, request, metadata)
    served.snapshot = None
    failure(get, b"\x0a\x02if", LET_IN)
    reading = page.slot(1).read()
    assert reading.requests == {"200": 2, "400": 1, "401": 1, "404": 1, "500": 0, "503": 1}
    assert {method: sum(counts) for method, counts in reading.latency.items()} == {"GetCommand": 5, "SyncCatalog": 1}
    assert reading.latency_sum_seconds["GetCommand"] > 0
    assert not any(page.slot(0).read().requests.values())


def test_a_call_without_a_key_is_refused_before_its_request_is_read(page: Pages) -> None:
    endpoint = Endpoint(DefinitionEngine(), KeyRing([digest(KEY)]), page.slot(0))
    assert failure(endpoint.handlers["GetCommand"], b"\xff", ()) == REFUSED


def test_a_catalogue_for_whose_copy_memory_is_too_small_fails_one_call_as_internal(page: Pages) -> None:
    class Large:
        def __bytes__(self) -> bytes:
            raise MemoryError("no room for 200 MB")

    class Engine(DefinitionEngine):
        def sync_catalog(self, request: bytes) -> Any:
            return Large()

    endpoint = Endpoint(Engine(), KeyRing([digest(KEY)]), page.slot(0))
    with captured_logs() as logs:
        assert failure(endpoint.handlers["SyncCatalog"], b"", LET_IN) == (Status.INTERNAL, "Internal error")
    assert logged(logs, "Unexpected failure in a call", log_level="error", method="SyncCatalog")


def test_a_bug_fails_one_call_as_internal_and_is_logged(page: Pages) -> None:
    class Broken(DefinitionEngine):
        def get_command(self, request: bytes) -> bytes:
            raise RuntimeError("the inside")

    endpoint = Endpoint(Broken(), KeyRing([digest(KEY)]), page.slot(0))
    with captured_logs() as logs:
        assert failure(endpoint.handlers["GetCommand"], b"", LET_IN) == (Status.INTERNAL, "Internal error")
    (line,) = logged(logs, "Unexpected failure in a call", log_level="error", method="GetCommand")
    assert isinstance(line["exc_info"], RuntimeError)
    assert page.slot(0).read().requests["500"] == 1


def test_the_time_a_call_takes_is_counted_under_its_method(page: Pages) -> None:
    class Slow(DefinitionEngine):
        def sync_catalog(self, request: bytes) -> bytes:
            begun = perf_counter()
            while perf_counter() - begun < 0.011:
                pass
            return b""

    endpoint = Endpoint(Slow(), KeyRing([digest(KEY)]), page.slot(0))
    endpoint.handlers["SyncCatalog"](b"", LET_IN)
    reading = page.slot(0).read()
    assert 0.011 <= reading.latency_sum_seconds["SyncCatalog"] < 10
    assert sum(reading.latency["SyncCatalog"][: LATENCY_BOUNDS.index(0.01) + 1]) == 0
    assert sum(reading.latency["SyncCatalog"]) == 1
    assert reading.latency_sum_seconds["GetCommand"] == 0


def test_every_status_has_a_label_in_http_terms() -> None:
    assert {status.http for status in Status} == set(STATUSES)
