"""Determines which promises an outcome broke, and whether the drill is valid."""

from __future__ import annotations

from typing import Literal

from tests.chaos.drills.model import Failure, Loss, Outcome, SetReport, Usage
from tests.chaos.drills.run import PATIENCE, first_time_kept, memory_back

Verdict = Literal["held", "BROKEN", "invalid"]

MOST_CYCLES = 3
"""Three cycles may pass: the cycle that runs at the commit, the next cycle, and another one before freshness is
checked.
"""
LEAST_OFFERED = 0.98
UNNOTICED_SECONDS = 5.0
"""Longest time for which a client may send calls on a connection that is broken. The kernel reports the end at once; a
client on a busy machine reads the report when its thread has a core.
"""


def verdict(outcome: Outcome) -> Verdict:
    """``BROKEN`` if a promise was broken; otherwise ``invalid`` if the drill proves nothing; otherwise ``held``."""
    if judge(outcome):
        return "BROKEN"
    return "invalid" if doubts(outcome) else "held"


def explained(outcome: Outcome) -> str:
    """All broken promises and doubts, for the message of a failing test."""
    return "\n".join([verdict(outcome), *judge(outcome), *doubts(outcome)])


def judge(outcome: Outcome) -> list[str]:
    """The broken promises, each as a sentence for the reader."""
    return [*outcome.broken, *_calls(outcome), *_answers(outcome), *_fresh(outcome), *_memory(outcome)]


def doubts(outcome: Outcome) -> list[str]:
    """The reasons why the drill is invalid: its load or its fault was not as intended."""
    load = outcome.load
    found = []
    if outcome.trouble:
        found.append(f"the drill could not be finished: {outcome.trouble}")
    if not outcome.felt:
        found.append("the fault had no effect")
    for name, each in (("without", load.plain), ("with", load.retrying)):
        wanted = load.rate * load.seconds / 2
        if each.offered == 0 or each.offered < LEAST_OFFERED * wanted:
            found.append(f"{each.offered} calls {name} a retry were offered of {wanted:.0f}")
        if each.answered + each.lost != each.offered:
            found.append(f"{each.offered - each.answered - each.lost} calls {name} a retry are unaccounted for")
    if load.too_late:
        found.append(f"{load.late} of {load.offered} calls were sent late: the machine was too busy for the load")
    return found


def _calls(outcome: Outcome) -> list[str]:
    load, allows = outcome.load, outcome.allows
    return [
        *_lost(load.retrying, allows.retried, outcome.wounds, "failed in spite of the default retry"),
        *_lost(load.plain, allows.plain, outcome.wounds, "without a retry failed"),
    ]


def _lost(calls: SetReport, allowed: Loss, wounds: list[tuple[float, float]], which: str) -> list[str]:
    if allowed is Loss.NONE:
        return [f"{calls.lost} calls {which}: {_examples(calls.failures)}"] if calls.lost else []
    found = []
    outside = [each for each in calls.failures if not _under_way(each, wounds, calls.failures)]
    if outside:
        found.append(f"{len(outside)} calls {which} that were not in flight at the fault: {_examples(outside)}")
    if calls.lost > len(calls.failures):
        found.append(f"{calls.lost} calls {which}, too many to judge each")
    return found


def _under_way(call: Failure, wounds: list[tuple[float, float]], failures: list[Failure]) -> bool:
    return any(_broken_by(call, since, until, failures) for since, until in wounds)


def _broken_by(call: Failure, since: float, until: float, failures: list[Failure]) -> bool:
    """Whether the call was in flight during the wound, or was sent before the client noticed that its connection was
    lost.

    The server cannot prevent such calls. The client has noticed the loss at the latest when a call on the connection
    has failed. If a call that was sent after the wound was answered, its connection is new or was not broken, so calls
    on it may not fail.
    """
    if call.ended < since:
        return False
    if call.sent <= until:
        return True
    if call.answered > until or call.sent > until + UNNOTICED_SECONDS or "failed to connect" in call.details.lower():
        return False
    noticed = min(each.ended for each in failures if each.channel == call.channel and each.ended >= since)
    return call.sent <= noticed


def _examples(failures: list[Failure]) -> str:
    return "; ".join(str(each) for each in failures[:3])


def _answers(outcome: Outcome) -> list[str]:
    load = outcome.load
    found = []
    if load.wrong_count:
        found.append(f"{load.wrong_count} answers were incomplete or of several versions: {'; '.join(load.wrong[:3])}")
    if outcome.written and (unknown := load.versions.keys() - set(outcome.written)):
        found.append(f"versions were served that were never written: {', '.join(sorted(unknown)[:5])}")
    if load.went_back and not outcome.allows.may_go_back:
        found.append(f"an older version was served after a newer one: {'; '.join(load.went_back[:3])}")
    return found


def _fresh(outcome: Outcome) -> list[str]:
    limit = outcome.fresh_limit_seconds
    if limit is None or not outcome.allows.fresh or outcome.trouble:
        return []
    if outcome.fresh_seconds is None:
        return [f"fresh rows were not served {PATIENCE * limit:.1f} s after the fault's end"]
    if outcome.fresh_seconds > limit:
        return [f"fresh rows took {outcome.fresh_seconds:.1f} s, one cycle is {limit:.1f} s at the most"]
    if outcome.fresh_cycles is not None and outcome.fresh_cycles > MOST_CYCLES and not outcome.allows.grace_seconds:
        return [f"fresh rows took {outcome.fresh_cycles} cycles"]
    return []


def _memory(outcome: Outcome) -> list[str]:
    fresh, before, after = outcome.fresh_server, outcome.before, outcome.after
    found = []
    if fresh is not None and before is not None and not first_time_kept(outcome, before):
        found.append(f"the first time kept memory or descriptors: {_grown(fresh, before)}")
    if before is not None and after is not None and outcome.allows.memory and not memory_back(before, after):
        found.append(f"memory did not come back: {_grown(before, after)}")
    return found


def _grown(before: Usage, after: Usage) -> str:
    return (
        f"{before.memory_bytes >> 20} → {after.memory_bytes >> 20} MiB, descriptors {before.descriptors} → "
        f"{after.descriptors}, threads {before.threads} → {after.threads}, "
        f"snapshots {before.memfds} → {after.memfds}"
    )
