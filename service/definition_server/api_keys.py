"""API keys by id: the text of ``API_KEYS``, one ``id:key`` a line.

The id is for people, metrics and logs; clients present only the key. Messages name lines and never quote them: any part
of a line may be a key.
"""

from __future__ import annotations

import re

METADATA_KEY = "x-avap-auth"
"""The metadata that carries a call's key."""

DEFAULT_ID = "default"
"""The id of the key in ``API_KEY``."""

MOST_KEYS = 64
"""The most keys. For a call that a worker does not remember, it compares the call's key with every one of them, which
takes about 0.3 µs each."""

LONGEST_KEY = 4096
"""The most octets of a key. Both transports refuse a request whose header fields are too long in total: the native
transport above 16 KiB, grpcio above 8 KiB. A client's other fields need a part of this space, and proxies add fields of
their own."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def key_fault(key: str) -> str | None:
    """Why ``key`` cannot be an API key; None if it can."""
    if not key.isascii() or not key.isprintable() or key != key.strip():
        return "gRPC metadata carries only printable ASCII without spaces at the ends"
    if len(key) > LONGEST_KEY:
        return f"it has {len(key)} octets; a header carries at most {LONGEST_KEY} of a key"
    return None


def parse_keys(text: str) -> dict[str, str]:
    """Id → key, in the order of ``text``. Blank lines, and lines that begin with ``#``, are skipped.

    Raises:
        ValueError: names the first line that cannot be used, without its content.
    """
    keys: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key_id, separator, key = line.partition(":")
        fault = _line_fault(key_id, separator, key)
        if fault is None and (key_id in keys or key in keys.values()):
            what, seen = ("id", key_id) if key_id in keys else ("key", next(i for i, k in keys.items() if k == key))
            fault = f"its {what} is that of line {lines[seen]}"
        if fault is not None:
            raise ValueError(f"line {number}: {fault}")
        keys[key_id], lines[key_id] = key, number
    if not keys:
        raise ValueError("it holds no key")
    if len(keys) > MOST_KEYS:
        raise ValueError(f"it holds {len(keys)} keys, and {MOST_KEYS} are allowed")
    return keys


def _line_fault(key_id: str, separator: str, key: str) -> str | None:
    if not separator:
        return "there is no colon between id and key"
    if not _ID.fullmatch(key_id):
        return "the id must be 1 to 64 letters, digits, dots, dashes and underscores, and begin with a letter or digit"
    if not key:
        return "the key is empty"
    if any(char.isspace() for char in key):
        return "there is white space in the key"
    return key_fault(key)
