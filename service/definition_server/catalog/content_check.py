"""Judges the content of one row as a client would: does its code compile, and is its interface a JSON array?

A client that refreshes its catalogue all or nothing runs ``compile()`` and ``json.loads()`` over every definition, so
one row that fails either stops it. Compiling hostile source can exhaust memory or end the process, so this module runs
only in the checker process (`control_plane.checker`). It imports little, because that process starts during a sync
cycle.
"""

from __future__ import annotations

import json
import re
from enum import IntFlag

MODULE, FUNCTION, INTERFACE = 1, 2, 4
"""The kinds of check, as bits: code as a module, code as a module that may return, the interface."""


class Flaw(IntFlag):
    """Faults of a row's content. Sent as one octet on the checker's socket, together with `ANSWER`."""

    NONE = 0
    CODE = 1
    """A client's ``compile`` refuses the code."""
    INTERFACE = 2
    """A client's ``json.loads`` refuses the interface, or the interface is not an array."""
    NOT_STRICT_JSON = 4
    """Python parses the interface, but RFC 8259 does not allow its NaN or Infinity. Other clients may refuse it."""
    EXHAUSTED = 8
    """Memory ran out; content that was judged earlier may be the cause."""
    UNKNOWN_CODING = 16
    """The source declares an encoding that this process does not have. Another process may have loaded it."""


ANSWER = 0x40
"""The bit that is set in every answer, so that neither a zero octet nor plain text is taken for an answer."""
READY = b"\x5a"
"""The first octet from the checker, sent when it is confined and its self-test has passed."""

_AS_TREE = 0x400
"""``PyCF_ONLY_AST``."""
_COOKIE = re.compile(rb"[^\n]*(?:\n[^\n]*)?coding[:=]")
_UNKNOWN_CODING = ("unknown encoding", "encoding problem")
_MARK = b"\xef\xbb\xbf"
_RETURN_OUTSIDE = "'return' outside function"


def flaws_of(checks: int, name: bytes, interface: bytes, code: bytes) -> Flaw:
    """The flaws of one row's content. ``checks``: the checks that are made, as bits."""
    found = Flaw.NONE
    if checks & INTERFACE:
        found |= interface_flaws(interface)
    if checks & (MODULE | FUNCTION):
        try:
            compile_as_client(code, name, function=bool(checks & FUNCTION))
        except MemoryError:
            found |= Flaw.CODE | Flaw.EXHAUSTED
        except SyntaxError as error:
            found |= Flaw.CODE
            if (error.msg or "").startswith(_UNKNOWN_CODING):
                found |= Flaw.UNKNOWN_CODING
        except Exception:  # noqa: BLE001 - whatever it is, a client's compile() fails with it too
            found |= Flaw.CODE
    return found


def interface_flaws(interface: bytes) -> Flaw:
    """The flaws of an interface."""
    odd = False

    def note(constant: str) -> float:
        nonlocal odd
        odd = True
        return float(constant)

    try:
        value = json.loads(interface.decode(), parse_constant=note)
    except MemoryError:
        return Flaw.INTERFACE | Flaw.EXHAUSTED
    except (ValueError, RecursionError):
        return Flaw.INTERFACE
    if not isinstance(value, list):
        return Flaw.INTERFACE
    return Flaw.NOT_STRICT_JSON if odd else Flaw.NONE


def compile_as_client(code: bytes, name: bytes, *, function: bool = False) -> None:
    """Compile ``code`` as clients do: ``compile(code, name, "exec")``, with the code as text and as octets.

    The two differ only if the first lines declare an encoding or the text begins with a byte order mark.

    Args:
        code: Source, UTF-8.
        name: The command's name, which clients use as file name.
        function: Whether a top-level ``return`` is allowed, as for a client that runs the code as the body of a
            function.

    Raises:
        Exception: whatever ``compile`` raises.
    """
    sources: list[str | bytes] = [code.decode()]
    if code.startswith(_MARK) or _COOKIE.match(code):
        sources.append(code)
    for source in sources:
        try:
            compile(source, name.decode(), "exec", dont_inherit=True)
        except SyntaxError as error:
            if not function or error.msg != _RETURN_OUTSIDE:
                raise
            _compile_body(source, name.decode())


def _compile_body(source: str | bytes, name: str) -> None:
    """Compile ``source`` as the body of a function. It is not indented, because that would change its multi-line
    strings.
    """
    tree = compile("def command(): pass", name, "exec", _AS_TREE, dont_inherit=True)
    tree.body[0].body = compile(source, name, "exec", _AS_TREE, dont_inherit=True).body
    compile(tree, name, "exec", dont_inherit=True)
