"""A deterministic simulation of the engine: clients, network, transports, handlers and an event loop around real code.

`grpc_h2`'s `Connection` (one for each client) and `FairScheduler` are real. Everything around them is simulated:

- `plan`: the actions of clients and handlers, and the limits of the server, drawn from the seed before the run.
- `client`: a client that obeys the rules and knows the right answer to each call. `tests.support.h2_replies` checks
  each frame of the server, including the sums of flow control.
- `server`: the protocol around a connection (reads, writes, time slices, pauses) and the handlers.
- `world`: virtual time, one queue of events, the network: sizes of chunks, delays, capacity of transports.

The oracle is the plan: a call that is not cancelled has one right outcome, for any division, delay and order of its
octets. After each event `world` checks the invariants; at the end, it checks that nothing is left over.

``python -m tests.simulation.engine --seeds 1000 --start 0`` runs seeds; ``--start N --seeds 1 --trace`` replays one and
prints its events.
"""
