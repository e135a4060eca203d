"""The metrics in the form that a scraper requests: format by ``Accept``, compression by ``Accept-Encoding`` (RFC 9110,
12.5).

`prometheus_client` writes the formats, but uses only a part of ``Accept`` to choose one: it ignores weights, and fails
on a quoted or unknown version. So this module parses the field, and passes on only the best media range.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

_OPENMETRICS, _PLAIN = "application/openmetrics-text", "text/plain"
_VERSIONS = {
    _OPENMETRICS: frozenset(("", "1.0.0")),
    _PLAIN: frozenset(("", "0.0.4", "1.0.0")),
    "text/*": frozenset(("",)),
    "*/*": frozenset(("",)),
}
"""Media range → supported versions. A range with another version cannot be satisfied."""
_GZIP_LEVEL = 6
_FEWEST_OCTETS = 1024
"""Octets below which compression is not worthwhile."""

# Elements of a list, and parameters of an element. Separators inside a quoted string are ignored (5.6.4).
_ELEMENT = re.compile(r'(?:[^,"]|"(?:\\.|[^"\\])*"?)+')
_PARAMETER = re.compile(r'(?:[^;"]|"(?:\\.|[^"\\])*"?)+')
_QUOTED_PAIR = re.compile(r"\\(.)")
_WEIGHT = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")

Headers = list[tuple[str, str]]


def expose(
    registry: CollectorRegistry, accept: str, accept_encoding: str, names: Sequence[str] = ()
) -> tuple[Headers, bytes]:
    """The header fields and the content of an answer with the metrics of ``registry``.

    Args:
        registry: The metrics.
        accept: The field ``Accept`` of the request; empty: there is none.
        accept_encoding: The field ``Accept-Encoding``, likewise.
        names: Only samples of these names; empty: all.
    """
    encoder, kind = choose_encoder(_best_range(accept))
    body = encoder(_Restricted(registry, frozenset(names)) if names else registry)
    headers = [("Content-Type", kind), ("Vary", "Accept, Accept-Encoding")]
    if len(body) >= _FEWEST_OCTETS and _wants_gzip(accept_encoding):
        body = gzip.compress(body, _GZIP_LEVEL)
        headers.append(("Content-Encoding", "gzip"))
    return headers, body


class _Restricted(Collector):
    """The samples with certain names. (`CollectorRegistry.restricted_registry` skips a collector that describes
    nothing.)
    """

    def __init__(self, registry: CollectorRegistry, names: frozenset[str]) -> None:
        self._registry = registry
        self._names = names

    def collect(self) -> Iterator[Metric]:
        """Every metric that has such samples, with no other samples."""
        for metric in self._registry.collect():
            samples = [sample for sample in metric.samples if sample.name in self._names]
            if samples:
                kept = Metric(metric.name, metric.documentation, metric.type, metric.unit)
                kept.samples = samples
                yield kept


def _best_range(accept: str) -> str:
    """The media range with the highest weight that can be satisfied, as `choose_encoder` reads it.

    The result is empty if there is none. The classic text format is then sent, as 12.5.1 allows.
    """
    ranges = [each for each in _weighted(accept) if each[2].get("version", "") in _VERSIONS.get(each[1], ())]
    if not ranges:
        return ""
    # Among equal weights the first one is used, because `sorted` is stable.
    _, kind, parameters = sorted(ranges, key=lambda each: -each[0])[0]
    kept = [f"{name}={parameters[name]}" for name in ("version", "escaping") if parameters.get(name)]
    return "; ".join((kind, *kept))


def prefers_html(accept: str) -> bool:
    """Whether a client with this field ``Accept`` requests HTML; otherwise it gets JSON.

    A browser names ``text/html``. ``*/*``, which other programs send, does not request HTML.
    """
    weights = {kind: weight for weight, kind, _ in _weighted(accept, zero=True)}
    html = weights.get("text/html", 0.0)
    json = weights.get("application/json", weights.get("application/*", weights.get("*/*", 0.0)))
    return html > 0 and html >= json


def _wants_gzip(accept_encoding: str) -> bool:
    """Whether gzip is acceptable, and its weight is not below that of the uncompressed text."""
    weights = {coding: weight for weight, coding, _ in _weighted(accept_encoding, zero=True)}
    weight = weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0)))
    return weight > 0 and weight >= weights.get("identity", 0.0)


def _weighted(field: str, *, zero: bool = False) -> Iterator[tuple[float, str, dict[str, str]]]:
    """The elements of a list with weights: weight, value in lower case, the other parameters.

    Malformed elements are left out. Unless ``zero`` is set, elements of weight 0 are also left out, because 0 means
    "not acceptable".
    """
    for element in _ELEMENT.findall(field):
        value, *rest = (part.strip() for part in _PARAMETER.findall(element) or [""])
        parameters = {}
        for part in rest:
            name, separator, text = part.partition("=")
            if separator:
                parameters[name.strip().lower()] = _unquoted(text.strip())
        weight = parameters.pop("q", "1")
        if value and _WEIGHT.fullmatch(weight) and (zero or float(weight) > 0):
            yield float(weight), value.lower(), parameters


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        return _QUOTED_PAIR.sub(r"\1", text[1:-1])
    return text
