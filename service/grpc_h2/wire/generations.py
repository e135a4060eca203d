"""A bounded mapping that keeps the entries that are used often, in two generations.

New entries go into the young generation. When the young generation is full, it becomes the old one, and the previous
old generation is dropped. An entry of the old generation that is looked up again moves into the young one. So an entry
survives as long as it is used at least once in each generation, and a hit costs no bookkeeping: the young generation is
the dict itself, and ``__missing__`` runs only if it has no entry.

A subclass defines ``__missing__`` by means of `recall` and `remember`.
"""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class TwoGenerations(dict[Key, Value]):
    """The dict is the young generation; the old generation is an attribute. ``generation``: the most entries of one
    generation."""

    __slots__ = ("_generation", "_old")

    def __init__(self, generation: int) -> None:
        super().__init__()
        self._generation = generation
        self._old: dict[Key, Value] = {}

    @property
    def old(self) -> dict[Key, Value]:
        """The old generation, which the caller must not change."""
        return self._old

    @property
    def held(self) -> int:
        """The number of entries of both generations."""
        return len(self) + len(self._old)

    def recall(self, key: Key) -> Value | None:
        """The entry of the old generation, if there is one. `remember` moves it into the young generation."""
        return self._old.get(key)

    def remember(self, key: Key, value: Value) -> None:
        """Put an entry into the young generation."""
        if len(self) >= self._generation:
            self.age()
        self[key] = value

    def age(self) -> None:
        """The young generation becomes the old one."""
        self.drop(self._old)
        self._old = dict(self)
        self.clear()

    def replace_old(self, old: dict[Key, Value]) -> None:
        """Replace the old generation."""
        self.drop(self._old)
        self._old = old

    def drop(self, generation: dict[Key, Value]) -> None:
        """Release ``generation``, which is no longer used. A subclass may free it a few entries at a time."""
