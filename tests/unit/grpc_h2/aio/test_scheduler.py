"""Deferred work is shared fairly, and takes no more than a time slice before the loop polls its sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.support.h2_wire import HELLO, SETTINGS_ACK, call, data, headers, request_block
from tests.unit.grpc_h2.aio.test_protocol import FakeTransport, loop_until, prepare

from grpc_h2.aio import listener as listener_module
from grpc_h2.aio import scheduler as module
from grpc_h2.aio.admission import Refusal, Trust
from grpc_h2.aio.protocol import Http2Protocol
from grpc_h2.aio.scheduler import FairScheduler, Share
from grpc_h2.aio.server import Server
from grpc_h2.connection.limits import Limits

CONNECTIONS = 8
CROWD = 40


class Clock:
    """The scheduler's clock. It advances only when a test sets it, even on a slow machine."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Work takes no time, so every iteration of the loop has a time slice, and all waiting work fits into it."""
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)
    return clock


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time slice ends with its first piece of work."""
    monkeypatch.setattr(module, "TIME_SLICE", 0.0)


@pytest.mark.usefixtures("no_time")
async def test_many_connections_with_deferred_work_take_no_more_of_the_loop_than_one() -> None:
    server = Server(limits=Limits(answers_per_turn=10))
    prepare(server)
    await server.start()
    transports: list[FakeTransport] = []
    protocols: list[Http2Protocol] = []
    for _ in range(CONNECTIONS):
        transport = FakeTransport()
        protocol = Http2Protocol(server, asyncio.get_running_loop())
        protocol.connection_made(transport)
        protocol.data_received(HELLO + SETTINGS_ACK)
        protocol.vouch(Trust.CLIENT)
        transports.append(transport)
        protocols.append(protocol)
    await loop_until(lambda: all(transport.writes for transport in transports))
    for protocol, transport in zip(protocols, transports, strict=True):
        transport.writes.clear()
        protocol.data_received(b"".join(call(stream) for stream in range(1, 101, 2)))

    def written() -> list[int]:
        return [len(each.writes) for each in transports]

    assert written() == [1] * CONNECTIONS, "the first ten answers at once"
    for step in range(1, 4 * CONNECTIONS + 1):
        await asyncio.sleep(0)
        assert sum(written()) == CONNECTIONS + step, "one turn of one connection in one turn of the loop"
        assert max(written()) - min(written()) <= 1, "the connections take turns"
    assert written() == [5] * CONNECTIONS
    await loop_until(lambda: all(each.is_reading() for each in transports))
    await server.stop(0)


@pytest.mark.usefixtures("no_time")
@pytest.mark.parametrize(("busy", "loops"), [(0.9, 1), (1.1, 2)])
async def test_a_busy_loop_postpones_the_time_slice_once(busy: float, loops: int, clock: Clock) -> None:
    scheduler, loop, taken = FairScheduler(), asyncio.get_running_loop(), 0

    def turn() -> None:
        nonlocal taken
        taken += 1
        if taken < 10:
            scheduler.defer(loop, turn)

    scheduler.defer(loop, turn)
    for step in range(1, 10 * loops + 1):
        clock.now += busy * module.BUSY_LIMIT
        await asyncio.sleep(0)
        assert taken == step // loops
    assert taken == 10


async def test_work_that_returns_true_ends_its_time_slice() -> None:
    scheduler, loop, taken = FairScheduler(), asyncio.get_running_loop(), []
    for number in range(6):
        scheduler.defer(loop, lambda number=number: taken.append(number) or number in (1, 2))
    seen = []
    for _ in range(3):
        await asyncio.sleep(0)
        seen.append(len(taken))
    assert seen == [2, 3, 6]


async def test_a_few_returning_connections_are_set_up_in_one_time_slice() -> None:
    """Strangers cannot increase the number of returning connections. If strangers make iterations long, setting up one
    connection at a time would be too slow."""
    scheduler, loop, taken = FairScheduler(), asyncio.get_running_loop(), []
    for number in range(8):
        scheduler.defer(loop, lambda number=number: taken.append(number) or True, Share.RETURNING)
    seen = []
    for _ in range(3):
        await asyncio.sleep(0)
        seen.append(len(taken))
    assert seen == [3, 6, 8]


async def test_a_time_slice_of_returning_connections_is_longer_and_ends(clock: Clock) -> None:
    scheduler, loop, taken = FairScheduler(), asyncio.get_running_loop(), []

    def work() -> None:
        clock.now += module.TIME_SLICE
        taken.append(None)

    for _ in range(20):
        scheduler.defer(loop, work, Share.RETURNING)
    await asyncio.sleep(0)
    most = module.RETURNING_SLICE / module.TIME_SLICE
    assert 1 < len(taken) <= most + 1


async def test_one_closing_connection_is_read_per_loop_iteration() -> None:
    """The read may end the connection at once, outside of any time slice."""
    server = Server()
    await server.start()
    transports = []
    for _ in range(3):
        transport = FakeTransport()
        protocol = Http2Protocol(server, asyncio.get_running_loop())
        protocol.connection_made(transport)
        protocol.data_received(b"no HTTP/2")
        assert not transport.is_reading()
        assert protocol._lingering_close is not None
        server.scheduler.defer(asyncio.get_running_loop(), protocol._lingering_close.read_on)
        transports.append(transport)
    for expected in (1, 2, 3):
        await asyncio.sleep(0)
        assert sum(each.is_reading() for each in transports) == expected
    await server.stop(0)


async def test_accepting_takes_no_more_than_its_share_of_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "ACCEPT_SLICE", 0.0)
    server = Server()
    prepare(server)
    port = server.add_insecure_port("127.0.0.1:0")
    (listener,) = server._listeners
    await server.start()
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        held = []
        for _ in range(3):
            listener._readable()
            held.append(server.admission.held)
        assert held == [1, 2, 3]
        await server.stop(0)


@pytest.mark.usefixtures("no_time")
async def test_time_slices_alternate_between_new_connections_clients_and_strangers() -> None:
    scheduler, loop = FairScheduler(), asyncio.get_running_loop()
    done: list[Share] = []

    def work(share: Share) -> None:
        done.append(share)
        scheduler.defer(loop, lambda: work(share), share)

    for _ in range(100):
        scheduler.defer(loop, lambda: work(Share.STRANGERS), Share.STRANGERS)
    await asyncio.sleep(0)
    assert done == [Share.STRANGERS], "no share is lost while the others do not wait"
    done.clear()
    for share in (Share.CLIENTS, Share.ARRIVALS):
        scheduler.defer(loop, lambda share=share: work(share), share)
    for _ in range(40):
        await asyncio.sleep(0)
    assert done.count(Share.ARRIVALS) == 20
    assert done.count(Share.CLIENTS) == 10
    assert done.count(Share.STRANGERS) == 10


async def test_a_few_first_reads_of_one_iteration_are_processed_at_once() -> None:
    scheduler, loop = FairScheduler(), asyncio.get_running_loop()
    for _ in range(2):
        claims = [scheduler.claim(loop, Share.ARRIVALS) for _ in range(10)]
        assert claims == [True] * module.CLAIMS + [False] * (10 - module.CLAIMS)
        await asyncio.sleep(0)


async def test_one_new_connection_of_an_iteration_is_set_up_at_once() -> None:
    scheduler, loop = FairScheduler(), asyncio.get_running_loop()
    for _ in range(2):
        claims = [scheduler.claim_setup(loop, Share.ARRIVALS) for _ in range(5)]
        assert claims == [True] * module.SETUPS + [False] * (5 - module.SETUPS)
        await asyncio.sleep(0)


@pytest.mark.parametrize("waiting", Share, ids=lambda share: share.name)
async def test_a_new_connection_waits_only_for_the_connections_before_it(waiting: Share) -> None:
    loop = asyncio.get_running_loop()
    for name in ("claim", "claim_setup"):
        for share, before_it in (
            (Share.RETURNING, (Share.RETURNING,)),
            (Share.ARRIVALS, (Share.RETURNING, Share.ARRIVALS)),
        ):
            scheduler = FairScheduler()
            scheduler.defer(loop, lambda: None, waiting)
            assert getattr(scheduler, name)(loop, share) is (waiting not in before_it)


async def test_a_time_slice_holds_several_short_pieces_of_work() -> None:
    told: list[int] = []
    scheduler, loop = FairScheduler(), asyncio.get_running_loop()
    for number in range(3):
        scheduler.defer(loop, lambda number=number: told.append(number))
    await asyncio.sleep(0)
    assert told == [0, 1, 2]


@pytest.mark.parametrize(("share", "expected"), [(0.4, [3, 6, 7]), (0.6, [2, 4, 6, 7]), (2.0, [1, 2, 3, 4, 5, 6, 7])])
async def test_a_time_slice_ends_with_the_work_during_which_its_time_runs_out(
    share: float, expected: list[int], clock: Clock
) -> None:
    scheduler, loop, done = FairScheduler(), asyncio.get_running_loop(), 0

    def work() -> None:
        nonlocal done
        done += 1
        clock.now += share * module.TIME_SLICE

    for _ in range(7):
        scheduler.defer(loop, work)
    seen = []
    while done < 7:
        await asyncio.sleep(0)
        seen.append(done)
    assert seen == expected


async def test_work_deferred_again_waits_for_the_next_loop_iteration() -> None:
    scheduler, loop, count = FairScheduler(), asyncio.get_running_loop(), 0

    def again() -> None:
        nonlocal count
        count += 1
        if count < 5:
            scheduler.defer(loop, again)

    scheduler.defer(loop, again)
    for expected in (1, 2, 3, 4, 5, 5):
        await asyncio.sleep(0)
        assert count == expected


async def test_work_that_raises_does_not_stop_other_deferred_work(
    event_loop_errors: list[BaseException],
) -> None:
    told: list[str] = []
    scheduler, loop = FairScheduler(), asyncio.get_running_loop()

    def fail() -> None:
        raise RuntimeError("a turn failed")

    scheduler.defer(loop, fail)
    scheduler.defer(loop, lambda: told.append("served"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told == ["served"]
    assert [str(each) for each in event_loop_errors] == ["a turn failed"]


@pytest.mark.usefixtures("no_time")
async def test_long_work_is_spread_over_loop_iterations() -> None:
    scheduler, loop = FairScheduler(), asyncio.get_running_loop()
    taken: list[int] = []
    served = 0

    def connection() -> None:
        nonlocal served
        served += 1
        scheduler.defer(loop, connection)

    scheduler.defer(loop, connection)
    task = asyncio.create_task(scheduler.spread(taken.append(number) for number in range(50)))
    before = 0
    while not task.done():
        await asyncio.sleep(0)
        assert len(taken) - before <= 1, "no more than a slice in a turn of the loop"
        before = len(taken)
    assert taken == list(range(50))
    assert served >= 49, "a connection with deferred work has every other turn of the queue"


async def test_short_steps_share_a_time_slice() -> None:
    taken: list[int] = []
    task = asyncio.create_task(FairScheduler().spread(taken.append(number) for number in range(3)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert taken == [0, 1, 2]
    await task


async def test_an_exception_of_a_step_is_raised_to_the_awaiting_task() -> None:
    def steps() -> Iterator[None]:
        yield
        raise RuntimeError("a step failed")

    with pytest.raises(RuntimeError, match="a step failed"):
        await FairScheduler().spread(steps())


@pytest.mark.usefixtures("no_time")
async def test_spread_work_ends_when_its_task_is_cancelled() -> None:
    taken: list[int] = []
    task = asyncio.create_task(FairScheduler().spread(taken.append(number) for number in range(50)))
    await loop_until(lambda: bool(taken))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    then = len(taken)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(taken) == then < 50


@pytest.fixture
async def event_loop_errors() -> list[BaseException]:
    """The exceptions that reach the loop's exception handler."""
    errors: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
    return errors


@pytest.mark.usefixtures("no_time")
async def test_one_of_many_waiting_connections_is_accepted_per_loop_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "ACCEPT_SLICE", 0.0)
    server = Server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        held = 0
        for _ in range(1000):
            await asyncio.sleep(0)
            assert server.connections <= held + 1, "one connection in one turn of the loop"
            held = server.connections
            if held == CONNECTIONS:
                break
        assert held == CONNECTIONS
        await server.stop(0)


@pytest.mark.usefixtures("no_time")
async def test_a_connection_is_set_up_before_the_crowd_of_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "ACCEPT_SLICE", 60.0)
    server = Server()
    prepare(server)
    port = server.add_insecure_port("127.0.0.1:0")
    (listener,) = server._listeners
    await server.start()
    with ExitStack() as stack:
        for _ in range(CROWD):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.8", 0)))
        stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.9", 0)))
        listener._readable()
        assert server.admission.held == CROWD + 1, "all connections are counted at once"
        assert not server.connections, "no connection is set up yet"
        await loop_until(lambda: any(protocol.network == "127.0.0.9" for protocol in server._protocols))
        assert server.connections <= module.SETUPS + 3
        await loop_until(lambda: server.connections == CROWD + 1)
        await server.stop(0)


@pytest.mark.usefixtures("no_time")
async def test_first_octets_are_processed_before_those_of_the_crowd_of_another_address() -> None:
    server = Server()
    prepare(server)
    await server.start()
    loop = asyncio.get_running_loop()
    transports = []
    for number in range(CROWD + 1):
        network = "crowd" if number < CROWD else "single"
        protocol = Http2Protocol(server, loop, network=network)
        transports.append(FakeTransport())
        protocol.connection_made(transports[-1])
        server.scheduler.claim(loop, Share.ARRIVALS)
        protocol.data_received(HELLO + SETTINGS_ACK + call(1))
    await loop_until(lambda: bool(transports[-1].writes))
    assert sum(bool(each.writes) for each in transports) <= module.CLAIMS + 3
    await loop_until(lambda: all(each.writes for each in transports))
    await server.stop(0)


@pytest.mark.usefixtures("no_time")
async def test_new_connections_from_a_clients_address_come_before_others_and_do_not_lock_them_out() -> None:
    scheduler, loop = FairScheduler(), asyncio.get_running_loop()
    done: list[Share] = []

    def work(share: Share) -> None:
        done.append(share)
        scheduler.defer(loop, lambda: work(share), share)

    for share in Share:
        scheduler.defer(loop, lambda share=share: work(share), share)
    for _ in range(80):
        await asyncio.sleep(0)
    assert [done.count(share) for share in Share] == [10, 20, 20, 30]


async def test_an_authorized_call_makes_the_address_known_for_later_connections() -> None:
    server = Server()
    prepare(server)
    port = server.add_insecure_port("127.0.0.1:0")
    (listener,) = server._listeners
    await server.start()
    made = [server._make_protocol(listener, ("127.0.0.7", 1))]
    server.admission.admit(made[0], "127.0.0.7", asyncio.get_running_loop())
    assert not server.admission.knows("127.0.0.7")
    made[0].vouch(Trust.CLIENT)
    server.admission.gone(made[0])
    made += [server._make_protocol(listener, (address, 2)) for address in ("127.0.0.7", "127.0.0.8")]
    assert [each.arrival for each in made] == [Share.ARRIVALS, Share.RETURNING, Share.ARRIVALS]
    assert port
    await server.stop(0)


async def test_an_accepted_connection_that_waits_for_its_setup_is_served_by_a_server_that_stops() -> None:
    server = Server()
    prepare(server)
    port = server.add_insecure_port("127.0.0.1:0")
    (listener,) = server._listeners
    await server.start()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setblocking(False)
        client.send(HELLO + SETTINGS_ACK + call(1))
        listener._readable()
        assert listener.busy
        stopping = asyncio.create_task(server.stop(5.0))
        answer = bytearray()
        while more := await asyncio.get_running_loop().sock_recv(client, 4096):
            answer += more
    assert b"S" * 100 in answer, "the call is answered before GOAWAY"
    await stopping
    assert server.admission.held == 0


@pytest.mark.parametrize("end", ["dismissed", "stopped"])
async def test_an_accepted_connection_that_ends_before_its_setup_leaves_no_descriptor(end: str) -> None:
    server = Server()
    port = server.add_insecure_port("127.0.0.1:0")
    (listener,) = server._listeners
    await server.start()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setblocking(False)
        listener._readable()
        (protocol,) = listener._setups
        protocol.drain()
        if end == "dismissed":
            protocol.dismiss(Refusal.EVICTED)
        else:
            await server.stop(None)
        answer = b""
        while more := await asyncio.get_running_loop().sock_recv(client, 4096):
            answer += more
        assert not listener.busy
        assert server.admission.held == server.connections == 0
        await server.stop(0)


@pytest.mark.usefixtures("no_time")
async def test_the_streams_of_an_ended_connection_are_released_a_few_at_a_time() -> None:
    server = Server()
    prepare(server)
    await server.start()
    protocol = Http2Protocol(server, asyncio.get_running_loop())
    protocol.connection_made(FakeTransport())
    protocol.data_received(HELLO + SETTINGS_ACK)
    begun = b"".join(headers(stream, request_block(b"/t.S/Get")) + data(stream, b"\0") for stream in range(1, 401, 2))
    protocol.data_received(begun)
    await loop_until(lambda: protocol.connection._streams.last_id == 399 and not protocol.connection.backlog)
    protocol.close()
    left = len(protocol.connection.released)
    assert left == 200 - 32, "a few were released at once"
    for _ in range(10):
        await asyncio.sleep(0)
        now = len(protocol.connection.released)
        assert left - now <= 32
        left = now
    assert left == 0
    protocol.connection_lost(None)
    await server.stop(0)
