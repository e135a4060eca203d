"""``API_KEYS``: which texts hold keys. A refusal names the line and never quotes it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from definition_server.api_keys import LONGEST_KEY, MOST_KEYS, key_fault, parse_keys
from grpc_h2 import Limits

MARK = "hunter2"

_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
_KEYS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64)


@given(st.dictionaries(_IDS, _KEYS, min_size=1, max_size=8).filter(lambda keys: len({*keys.values()}) == len(keys)))
def test_keys_are_read_as_they_were_written(keys: dict[str, str]) -> None:
    assert parse_keys("\n".join(f"{key_id}:{key}" for key_id, key in keys.items())) == keys


def test_comments_blank_lines_and_line_ends_of_windows_are_skipped() -> None:
    assert parse_keys("# keys\r\n\r\na:1\r\n  # more\n  \nb:2:3\n") == {"a": "1", "b": "2:3"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (MARK, "line 1: there is no colon"),
        (f"a:1\n\n:{MARK}", "line 3: the id must be"),
        (f"{MARK} x:1", "line 1: the id must be"),
        (f"-a:{MARK}", "line 1: the id must be"),
        (f"{'a' * 65}:{MARK}", "line 1: the id must be"),
        (f"\xfc:{MARK}", "line 1: the id must be"),
        (f" a:{MARK}", "line 1: the id must be"),
        ("a:", "line 1: the key is empty"),
        (f"a: {MARK}", "line 1: there is white space"),
        (f"a:{MARK} ", "line 1: there is white space"),
        (f"a:{MARK}\t", "line 1: there is white space"),
        (f"a:{MARK} # the old one", "line 1: there is white space"),
        (f"a:{MARK}\xe9", "line 1: gRPC metadata"),
        (f"a:{MARK}\x7f", "line 1: gRPC metadata"),
        (f"a:{MARK * LONGEST_KEY}", "line 1: it has"),
        (f"a:1\na:{MARK}", "line 2: its id is that of line 1"),
        (f"# x\na:{MARK}\nb:2\nc:{MARK}", "line 4: its key is that of line 2"),
        ("", "it holds no key"),
        ("# none\n", "it holds no key"),
        ("\n".join(f"id{n}:{MARK}{n}" for n in range(MOST_KEYS + 1)), f"and {MOST_KEYS} are allowed"),
    ],
)
def test_a_refusal_names_the_line_and_not_the_key(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"line|holds") as caught:
        parse_keys(text)
    assert reason in str(caught.value)
    assert MARK not in str(caught.value)


def test_the_longest_key_fits_into_the_header_fields_of_both_transports() -> None:
    """grpcio's own limit is 8 KiB (``grpc.max_metadata_size``). Half of it is left for the rest of a request."""
    assert key_fault("k" * LONGEST_KEY) is None
    assert min(Limits().max_header_list, 8192) // 2 >= LONGEST_KEY
