"""The number of examples that Hypothesis tries: ``quick`` for a result in minutes, ``long`` for CI's coverage stage and
`nox -s fuzz`.

``HYPOTHESIS_PROFILE`` or pytest's ``--hypothesis-profile`` names the profile. ``quick`` tries the same examples in each
run, so that its verdict depends on the code alone; ``long`` draws new ones.
"""

from __future__ import annotations

import os

from hypothesis import settings

_LONG = 100

# No deadline for an example, because its duration depends more on other work of the machine than on the code.
settings.register_profile("long", max_examples=_LONG, deadline=None)
settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)


def load_profile() -> None:
    """Load the profile that the environment names."""
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "quick")


def examples(full: int) -> int:
    """``max_examples`` of a test that tries ``full`` examples in the profile ``long``, and a share of them in another
    profile."""
    profile = settings.default
    assert profile is not None
    return max(1, full * profile.max_examples // _LONG)
