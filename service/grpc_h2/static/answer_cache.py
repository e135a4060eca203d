"""The answers that a static method remembers, by request, and how they are replaced when the data changes.

**Theory of operation.** A remembered answer is valid until the application reports that its data changed. The next
calls would then have to look up every answer again, all at once. So the application can *prepare* before it changes its
data: `PreparedAnswers` looks up every remembered request in the new data, one request in each step, and
`PreparedAnswers.install` replaces the remembered answers in a tenth of a millisecond. Freeing thousands of answers also
takes milliseconds, so the replaced answers wait in `AnswerCache.replaced` and are released a few at a time.

The number and the size of remembered answers are bounded, because the peer chooses the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Final, TypeAlias

from grpc_h2.rpc.messages import plain_message
from grpc_h2.static.answers import LARGEST_FRAMED, StaticAnswer
from grpc_h2.wire.generations import TwoGenerations

Lookup: TypeAlias = Callable[[bytes], StaticAnswer]
"""Message → answer. The function must not raise."""

REMEMBERED_ANSWERS: Final = 4096
"""The most answers in one generation of one static method; there are two generations."""
REMEMBERED_FAILURES: Final = 256
RELEASED_AT_ONCE: Final = 8
_LARGEST_REMEMBERED_REQUEST: Final = 256


class AnswerCache(TwoGenerations[bytes, StaticAnswer | None]):
    """Length-prefixed message → answer; a missing answer is looked up once.

    A payload that is not one plain message has the answer None: a `MessageReader` must take it apart. Replaced answers
    are released whenever a new request is looked up. This is fast enough, because every remembered answer was looked up
    once. Only the answers that `take_over` replaces are not matched by look-ups, so the caller of `take_over` has to
    call `release_some`.
    """

    __slots__ = ("_failures", "_large", "_lookup", "replaced")

    def __init__(self, lookup: Lookup) -> None:
        super().__init__(REMEMBERED_ANSWERS)
        self._lookup = lookup
        self._failures: dict[bytes, StaticAnswer] = {}
        """Answers for undefined names. Their number is small, and they are kept separately, so that a flood of
        undefined names displaces no answer that is in use."""
        self._large: tuple[bytes, StaticAnswer] | None = None
        """Payload and answer of the last large message that was looked up, in frames. Only one is kept, because it may
        have `LARGEST_FRAMED` octets."""
        self.replaced: list[dict[bytes, StaticAnswer | None]] = []
        """Generations that wait to be released."""

    def __missing__(self, payload: bytes) -> StaticAnswer | None:
        if self._large is not None and self._large[0] == payload:
            return self._large[1]
        answer = self._failures.get(payload)
        if answer is not None:
            return answer
        answer = self.recall(payload)
        if answer is None:
            message = plain_message(payload)
            if message is None:
                return None
            answer = self._lookup(message)
            if len(payload) > _LARGEST_REMEMBERED_REQUEST or not answer.lasting:
                return answer
            if answer.pieces is None:
                # Larger messages are not copied. So their answers take no time to make, but keep the application's
                # memory in use.
                if answer.size <= LARGEST_FRAMED:
                    answer.frame()
                    self._large = payload, answer
                return answer
            if answer.message is None:
                if len(self._failures) >= REMEMBERED_FAILURES:
                    self._failures.clear()
                self._failures[payload] = answer
                return answer
        self.remember(payload, answer)
        if self.replaced:
            self.release_some()
        return answer

    def requests(self) -> list[bytes]:
        """The payloads that are remembered, the recently requested ones first."""
        return [*self, *self._failures, *self._old]

    def take_over(self, other: AnswerCache) -> None:
        """Replace the answers of this object by those of ``other``, in place, because routes hold this object's
        ``__getitem__``.

        ``other`` loses its answers. If ``other`` kept them, answers that this object replaces later would not be
        released a few at a time, but all at once with ``other``.
        """
        self.age()
        self.update(other)
        other.clear()
        self.replace_old(other.old)
        self._failures = other._failures
        self._large, other._large = other._large, None

    def forget(self) -> None:
        """Drop every remembered answer."""
        self._failures.clear()
        self._large = None
        self.age()
        self.age()

    def drop(self, generation: dict[bytes, StaticAnswer | None]) -> None:
        """See `TwoGenerations.drop`."""
        if generation:
            self.replaced.append(generation)

    def release_some(self) -> None:
        """Release a few of the answers in ``replaced``, which must not be empty."""
        oldest = self.replaced[-1]
        for _ in range(min(RELEASED_AT_ONCE, len(oldest))):
            oldest.popitem()
        if not oldest:
            self.replaced.pop()


class Preparation(Enum):
    """The state of a preparation.

    ::

        PREPARING ──install──▶ INSTALLED
            └─────discard────▶ DISCARDED
    """

    PREPARING = auto()
    """Answers are added step by step. The preparation may be installed at any time: missing answers are looked up on
    demand."""
    INSTALLED = auto()
    """The answers are in use."""
    DISCARDED = auto()
    """The data from which the answers were made will not be served, or a later preparation has replaced this one."""


class PreparedAnswers:
    """Answers of one static method that are made from data which is not served yet: see `StaticUnary.prepare`."""

    __slots__ = ("_coming", "_served", "state")

    def __init__(self, served: AnswerCache, lookup: Lookup) -> None:
        self._served = served
        self._coming = AnswerCache(lookup)
        self.state = Preparation.PREPARING

    def steps(self) -> Iterator[None]:
        """Prepare one answer in each step, which takes about 10 µs; ends early if the preparation was installed or
        discarded.

        At most 2 × `REMEMBERED_ANSWERS` + `REMEMBERED_FAILURES` steps. Recent requests are first, so the caller may
        stop at any step.
        """
        for payload in self._served.requests():
            if self.state is not Preparation.PREPARING:
                return
            self._coming[payload]
            yield

    def install(self) -> None:
        """The data from which these answers were made is served now: they replace the remembered answers.

        This takes a tenth of a millisecond; `StaticUnary.release` frees the replaced answers.

        Raises:
            RuntimeError: if the preparation was installed or discarded before.
        """
        if self.state is not Preparation.PREPARING:
            raise RuntimeError(f"prepared answers cannot be installed: they are {self.state.name.lower()}")
        self.state = Preparation.INSTALLED
        self._served.take_over(self._coming)

    def discard(self) -> None:
        """The data from which these answers were made is not going to be served. No effect once they are installed."""
        if self.state is Preparation.PREPARING:
            self.state = Preparation.DISCARDED
