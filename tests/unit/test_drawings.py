"""Drawings of the documentation are well-formed, complete in themselves, and fit their frame."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRAWINGS = sorted((ROOT / "docs").rglob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
WIDEST = 0.62
"""Width of a letter as a multiple of its size, in DejaVu Sans, the widest of the usual fonts."""


@pytest.fixture(params=DRAWINGS, ids=lambda path: str(path.name))
def drawing(request: pytest.FixtureRequest) -> ET.Element:
    path: Path = request.param
    return ET.fromstring(path.read_text(encoding="utf-8"))


def test_there_is_a_drawing_and_pages_show_it() -> None:
    assert DRAWINGS
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", ROOT / "docs/architecture.md"))
    assert [path.name for path in DRAWINGS if f"{path.name})" not in pages] == []


def test_a_drawing_has_a_name_and_a_description_for_readers_who_cannot_see_it(drawing: ET.Element) -> None:
    assert drawing.tag == f"{SVG}svg"
    assert all((drawing.findtext(f"{SVG}{tag}") or "").strip() for tag in ("title", "desc"))


def test_a_drawing_refers_to_no_other_file(drawing: ET.Element) -> None:
    for element in drawing.iter():
        assert element.tag not in (f"{SVG}script", f"{SVG}image", f"{SVG}foreignObject")
        assert [name for name in element.attrib if name.endswith("href")] == []


def test_all_parts_of_a_drawing_are_within_its_frame_and_all_words_within_their_boxes(drawing: ET.Element) -> None:
    left, top, width, height = (float(number) for number in drawing.attrib["viewBox"].split())
    boxes = []
    for box in drawing.iter(f"{SVG}rect"):
        x, y = float(box.get("x", 0)), float(box.get("y", 0))
        wide, high = float(box.attrib["width"]), float(box.attrib["height"])
        assert left <= x <= x + wide <= left + width
        assert top <= y <= y + high <= top + height
        if box.get("class") in ("box", "memory"):
            boxes.append((x, y, x + wide, y + high))
    for text in drawing.iter(f"{SVG}text"):
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        half = len(text.text or "") * (12 if text.get("class") == "soft" else 14) * WIDEST / 2
        begin, end = (x - half, x + half) if text.get("text-anchor") == "middle" else (x, x + 2 * half)
        assert left <= begin <= end <= left + width, text.text
        for x1, y1, x2, y2 in boxes:
            if x1 < x < x2 and y1 < y < y2:
                assert x1 <= begin <= end <= x2, text.text
