"""Ids of parametrized tests: short and printable ASCII, so that every runner can carry them."""

from __future__ import annotations

from tests.support.h2_wire import PREFACE, split_frames

LONGEST = 40
_KINDS = (
    "DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE",
    "CONTINUATION",
)  # fmt: skip


def parameter_id(value: object) -> str | None:
    """An id for octets and for text; None if pytest's own id is suitable.

    Octets that are whole frames are shown by the types of the frames, printable octets as they are, and others in
    hexadecimal digits.
    """
    if isinstance(value, str):
        return None if value.isascii() and value.isprintable() and len(value) <= LONGEST else _cut(ascii(value)[1:-1])
    if not isinstance(value, bytes) or not value:
        return None
    frames, rest = split_frames(value.removeprefix(PREFACE))
    if frames and not rest:
        preface = "preface, " if value.startswith(PREFACE) else ""
        return _cut(preface + ", ".join(_kind(each.kind, each.stream, len(each.payload)) for each in frames))
    text = value.decode("latin-1")
    return _cut(text if text.isascii() and text.isprintable() else value.hex())


def _kind(kind: int, stream: int, octets: int) -> str:
    name = _KINDS[kind] if kind < len(_KINDS) else f"type 0x{kind:02x}"
    return f"{name}({octets})" + (f" on {stream}" if stream else "")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
