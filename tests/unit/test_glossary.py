"""The project uses the terms of docs/glossary.md, and not the names that they replaced.

The source code, the documentation, everything that operators deploy, the tests and the measurements are searched. The
table of renamed terms in the changelog is the only place with the old names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs/glossary.md"
CHANGELOG = ROOT / "CHANGELOG.md"
SEARCHED = ("service", "docs", "deploy", "tests", "perf", "README.md", "CHANGELOG.md", "Dockerfile", "noxfile.py")
SUFFIXES = {"", ".md", ".py", ".pyi", ".sh", ".sql", ".toml", ".yaml", ".yml", ".json"}
RENAMED = re.compile(r"^### Renamed\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)

REPLACED = {
    r"\bDoors?\b": "static method, Router",
    r"\bdoors?\b": "static method, Router",
    r"\bTurns\b": "FairScheduler",
    r"\b[Ll]eftovers\b": "deferred work",
    r"\b[Cc]omplaints?\b": "RateLimitedLog, message",
    r"\bShell\b": "Http2Protocol",
    r"\bshells?\b": "Http2Protocol, protocol",
    r"\b_?hear_on(_later)?\b": "lingering close",
    r"\bhopeless\w*": "hard limit",
    r"\bStanding\b": "StreamStatus",
    r"\bbring_level\b": "reconcile",
    r"\bPost\b": "WorkerSlot",
    r"\b_?mourn\w*": "on_exit",
    r"\bbury\w*|\bburied\b": "release",
    r"\b_?[Rr]etirement\b": "DelayedRelease",
    r"\blets? go\b|\bletting go\b": "release",
    r"\btid(y|ies|ied)\b": "release",
    r"\b[Tt]all(y|ies)\b": "answer id",
    r"\blooks? at the table\b": "change check",
    r"\b(a|the|each|every|one|first|last|cheap) look\b(?!-|up| of |$)": "change check",
}
"""Pattern of a replaced term → the term to use."""
ANY = re.compile("|".join(REPLACED))

# These uses are not the replaced terms: the shell of an operating system, the front door of a package, the word in
# sample commands, and the module that finds descriptors and processes left behind by a test.
ALLOWED = re.compile(
    r"(a|no|without a|password, a|as) shells?\b|\bfront door\b|shell in between|/bin/(ba)?sh|\bPOST\b"
    r"|tests\.support\.leftovers|shell=|The inner shell|One shell for all|Each shell leaves|"
    r"\bshell( =|\.pid|\.args|\.returncode|\.communicate)"
)
LEFT_OUT = {"sample_catalogue.toml", Path(__file__).name}
NOT_OURS = {"__pycache__", "node_modules", "results"}


def texts(*names: str) -> Iterator[tuple[Path, str]]:
    for name in names:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if (
                path.is_file()
                and path.suffix in SUFFIXES
                and path.name not in LEFT_OUT
                and not NOT_OURS & {*path.parts}
            ):
                yield path, path.read_text(encoding="utf-8")


def found(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, replaced term and the term to use, for each use of a replaced term."""
    for number, line in enumerate(text.splitlines() if ANY.search(text) else (), 1):
        line = ALLOWED.sub("", line)
        for pattern, better in REPLACED.items():
            for match in re.finditer(pattern, line):
                yield number, match.group(), better


@pytest.mark.parametrize("name", SEARCHED)
def test_replaced_terms_are_not_used(name: str) -> None:
    uses = [
        f"{path.relative_to(ROOT)}:{number}: {term!r}; use: {better}"
        for path, text in texts(name)
        for number, term, better in found(RENAMED.sub("", text) if path == CHANGELOG else text)
    ]
    assert uses == [], "\n".join(uses)


@pytest.mark.parametrize(
    "text",
    ["self.doors = Doors()", "a static door", "leftovers share a slice", "class Shell:", "hopeless_list",
     "bring_level()", "its tally number", "Oldest look at the table", "a look scans it", "who lets go of it last"],
)  # fmt: skip
def test_a_replaced_term_is_found(text: str) -> None:
    assert list(found(text))


@pytest.mark.parametrize(
    "text",
    ["an account without a shell", "a look-up", "POST /", "indoors", "totally", "one look-up for each call"],
)
def test_other_words_are_not_mistaken_for_replaced_terms(text: str) -> None:
    assert not list(found(text))


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| term |")
    ]


def test_the_glossary_defines_each_term_once() -> None:
    defined = [term for term, *_ in rows(GLOSSARY.read_text(encoding="utf-8"))]
    assert len(defined) > 40
    assert len(defined) == len(set(defined))


def test_the_glossary_names_places_that_exist() -> None:
    service = ROOT / "service"
    for term, _, where in rows(GLOSSARY.read_text(encoding="utf-8")):
        for place in re.findall(r"`([a-z0-9_/]+/(?:\w+\.py)?)`", where):
            assert any((base / place).exists() for base in (service / "definition_server", service, ROOT)), term
