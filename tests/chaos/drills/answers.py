"""The conditions for an answer: it is complete, belongs to one version, and agrees with its hashes."""

from __future__ import annotations

from tests.chaos.drills import rows

from definition_server.catalog.signing import MAGIC, SignatureError, payload_of
from definition_server.rpc import avap_pb2

MOST_REMEMBERED = 20_000


class WrongAnswer(Exception):
    """An answer that no publication contains."""


def check_definition(answer: avap_pb2.CommandResponse) -> None:
    """Raises `WrongAnswer` if the hash is not that of the content."""
    source = answer.code
    if source.startswith(MAGIC):
        try:
            source = payload_of(source)
        except SignatureError as error:
            raise WrongAnswer(f"{answer.name}: {error}") from error
    if answer.hash != rows.definition_hash(answer.name, answer.type, answer.interface_json, source):
        raise WrongAnswer(f"{answer.name}: its hash is not that of its content")


def check_catalogue(answer: avap_pb2.CatalogResponse) -> None:
    """Raises `WrongAnswer` if count, order or version hash do not agree with the definitions."""
    found = [command.name for command in answer.commands]
    if answer.total_count != len(found):
        raise WrongAnswer(f"total_count is {answer.total_count}, there are {len(found)} definitions")
    if found != sorted(set(found)):
        raise WrongAnswer("the definitions are not sorted by name, or a name occurs twice")
    for command in answer.commands:
        check_definition(command)
    if answer.version_hash != rows.version_hash([(c.name, c.hash) for c in answer.commands]):
        raise WrongAnswer(f"the version hash {answer.version_hash[:12]}… is not that of the {len(found)} definitions")


class Checker:
    """Judges answers, and remembers judged answers by their bytes, so that a repeated answer costs one look-up.

    If ``count`` is above 0, the catalogue is a `rows.VersionedTable` of ``count`` rows with ``size`` octets of filling,
    and an answer's version is the tag in its code. If ``count`` is 0, any catalogue is accepted, and only an answer to
    ``SyncCatalog`` has a version: its hash.
    """

    def __init__(self, count: int = 0, size: int = 0) -> None:
        self._count = count
        self._size = size
        self._known: dict[bytes, str | None] = {}

    def definition(self, name: str, answer: bytes) -> str | None:
        """The version of an answer to ``GetCommand(name)``; None if it has none. Raises `WrongAnswer`."""
        if answer not in self._known:
            self._remember(answer, self._judged_definition(name, answer))
        elif not answer.startswith(_named(name)):
            raise WrongAnswer(f"asked for {name}, got another command")
        return self._known[answer]

    def catalogue(self, answer: bytes) -> str:
        """The version of an answer to ``SyncCatalog``. Raises `WrongAnswer`."""
        if answer not in self._known:
            self._remember(answer, self._judged_catalogue(answer))
        return str(self._known[answer])

    def _remember(self, answer: bytes, version: str | None) -> None:
        if len(self._known) >= MOST_REMEMBERED:
            self._known.clear()
        self._known[answer] = version

    def _judged_definition(self, name: str, answer: bytes) -> str | None:
        parsed = avap_pb2.CommandResponse.FromString(answer)
        if parsed.name != name:
            raise WrongAnswer(f"asked for {name}, got {parsed.name!r}")
        check_definition(parsed)
        return self._tag(parsed) if self._count else None

    def _judged_catalogue(self, answer: bytes) -> str:
        parsed = avap_pb2.CatalogResponse.FromString(answer)
        check_catalogue(parsed)
        if not self._count:
            return parsed.version_hash
        if parsed.total_count != self._count:
            raise WrongAnswer(f"a catalogue of {parsed.total_count} definitions; every version has {self._count}")
        tags = {self._tag(command) for command in parsed.commands}
        if len(tags) != 1:
            raise WrongAnswer(f"one catalogue with rows of the versions {', '.join(sorted(tags))}")
        (tag,) = tags
        if parsed.version_hash != rows.expected_hash(int(tag), self._count, self._size):
            raise WrongAnswer(f"the version hash {parsed.version_hash[:12]}… is not that of version {tag}")
        return tag

    def _tag(self, command: avap_pb2.CommandResponse) -> str:
        tag = rows.version_in(command.name, command.code)
        if tag is None or command.code != rows.code(command.name, int(tag), self._size):
            raise WrongAnswer(f"{command.name}: its code is that of no version")
        return tag


def _named(name: str) -> bytes:
    """The first octets of every serialized ``CommandResponse`` of that name."""
    return avap_pb2.CommandResponse(name=name).SerializeToString()
