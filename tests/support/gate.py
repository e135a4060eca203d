"""A row gate with a checker in this process, and the refresh of a catalogue by a strict client."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence

from definition_server.catalog.content_check import Flaw, flaws_of
from definition_server.catalog.signing import UNSIGNED, payload_of
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.checker import CannotCheck, Content, Judgement


class CheckerHere:
    """A checker that judges in this process, for sources that are not hostile. A test may set ``refusal`` or
    ``judgements``."""

    def __init__(self) -> None:
        self.judged: list[Content] = []
        self.refusal = ""
        """If it is not empty, no checker can be started, for this reason."""
        self.judgements: dict[bytes, Judgement] = {}
        """Code → the answer in place of the true one."""
        self.low_priority = False

    async def check(self, contents: Sequence[Content]) -> list[Judgement]:
        """See `RowChecker.check`."""
        if self.refusal:
            raise CannotCheck(self.refusal)
        self.judged += contents
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = ~(Flaw.EXHAUSTED | Flaw.UNKNOWN_CODING)
            return [self.judgements.get(each.code) or Judgement(flaws_of(*each) & own) for each in contents]

    async def prepare(self) -> None:
        """Nothing has to be started."""

    def lower_priority(self) -> None:
        """Note that the priority was lowered."""
        self.low_priority = True

    async def close(self) -> None:
        """Nothing runs."""


def refresh(snapshot: Snapshot) -> dict[str, str]:
    """Refresh a catalogue as the AVAP language server does: all or nothing. Returns name → code.

    Raises:
        Exception: from ``compile`` or from the JSON parser. The language server then keeps its old catalogue.
    """
    fresh = {}
    for definition in snapshot:
        code = definition.code if snapshot.footer.key_id == UNSIGNED else payload_of(definition.code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code.decode(), definition.name, "exec")
            compile(code, definition.name, "exec")
        interface = json.loads(definition.interface_json)
        if not isinstance(interface, list):
            raise TypeError(f"{definition.name}: the interface is no array")
        fresh[definition.name] = code.decode()
    return fresh
