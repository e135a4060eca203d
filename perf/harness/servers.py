"""The servers of one measurement, each started at its first use, all with the same catalogue."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from perf import peers
from perf.generator.scenarios import COMPILED, PURE, WORKERS
from perf.targets.catalogue import Catalogue
from perf.targets.target import Target, TargetFailed, Worker, engine_program, self_signed, worker

Starter = Callable[["Servers"], AbstractContextManager[Target]]
"""Starts a server that is neither our usual one nor a peer: a candidate or a base."""


class Servers:
    """Starts servers and keeps them running. The caller closes it."""

    def __init__(self, catalogue: Catalogue, *, tls: bool = False, others: Mapping[str, Starter] | None = None) -> None:
        """``others``: name → function that starts the server; it overrides our server or a peer of the same name."""
        self.catalogue = catalogue
        self._others = others or {}
        self._stack = ExitStack()
        self._running: dict[str, tuple[ExitStack, Target]] = {}
        self._workers: dict[str, Worker] = {}
        self._failures: dict[str, Exception] = {}
        self._generations: dict[str, int] = {}
        self.tls: dict[str, str] = {}
        if tls:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="definition-server-perf-"))
            self.tls = self_signed(Path(folder))

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def target(self, name: str) -> Target:
        """The running server ``name``. A server that could not be started is not started again.

        Raises:
            TargetFailed: if the server does not start; `perf.peers.PeerMissing` if a peer is not installed.
            OSError: if a program is missing.
        """
        if name in self._failures:
            raise self._failures[name]
        if name not in self._running:
            with ExitStack() as stack:
                try:
                    target = self._start(name, stack)
                except Exception as error:
                    self._failures[name] = error
                    raise
                self._running[name] = stack.pop_all(), target
        return self._running[name][1]

    def _start(self, name: str, stack: ExitStack) -> Target:
        if name in self._others:
            return stack.enter_context(self._others[name](self))
        if name in WORKERS:
            self._workers[name] = stack.enter_context(self._ours(name))
            return self._workers[name].target
        return stack.enter_context(peers.start(name, self.catalogue, tls=self.tls or None))

    def _ours(self, name: str) -> AbstractContextManager[Worker]:
        """One of `WORKERS`, with the form of the engine under which its figures are stored."""
        if name == COMPILED:
            return self.worker(PURE, name=name, program=engine_program("compiled", peers.compiled_engine()))
        return self.worker(name, program=engine_program("pure")) if name == PURE else self.worker(name)

    def worker(self, transport: str, **more: Any) -> AbstractContextManager[Worker]:
        """A worker of ours with these servers' catalogue and certificate."""
        return worker(transport, self.catalogue.descriptor, self.catalogue.built, **self.tls, **more)

    def stop(self, name: str) -> None:
        """End the server ``name``, if it runs; the next use starts a new one.

        Raises:
            TargetFailed: if the server had ended before.
        """
        self._workers.pop(name, None)
        self._generations.pop(name, None)
        if name in self._running:
            self._running.pop(name)[0].close()

    @contextmanager
    def publications(self, name: str, count: int) -> Iterator[Callable[[], None]]:
        """A function that publishes the next of ``count`` generations.

        They are built and sealed beforehand: on two CPUs the master's work would slow the generator down.

        Raises:
            TargetFailed: if ``name`` is not one of our workers.
        """
        self.target(name)
        published = self._workers.get(name)
        if published is None:
            raise TargetFailed(f"{name} cannot publish: only {', '.join(WORKERS)} can")
        first = self._generations.get(name, self.catalogue.built.footer.generation) + 1
        self._generations[name] = first + count - 1
        made = [self.catalogue.generation(first + number) for number in range(count)]
        waiting = iter(made)
        try:
            yield lambda: published.publish(*next(waiting))
        finally:
            for descriptor, _ in made:
                os.close(descriptor)

    def close(self) -> None:
        """End all servers. A server that had ended before is not reported here, because its runs report the end."""
        for name in list(self._running):
            with suppress(TargetFailed):
                self.stop(name)
        self._stack.close()
