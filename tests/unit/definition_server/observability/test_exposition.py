"""The format of the metrics follows ``Accept`` and ``Accept-Encoding`` by RFC 9110, 12.5; any field gets an answer."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.fakes import service_status

from definition_server.observability.exposition import expose
from definition_server.observability.metrics import create_registry

REGISTRY = create_registry(service_status)
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


def kind(accept: str) -> str:
    headers, body = expose(REGISTRY, accept, "")
    found = dict(headers)["Content-Type"]
    assert body.endswith(b"# EOF\n") == found.startswith("application/openmetrics-text")
    return found.partition(";")[0]


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text",
        "application/openmetrics-text; version=1.0.0",
        'application/openmetrics-text;version="1.0.0"',
        'APPLICATION/OpenMetrics-Text;Version="1.0.0"',
        "text/plain;q=0.5, application/openmetrics-text",
        "text/plain;version=0.0.4;q=0.1,application/openmetrics-text;q=0.9",
        'application/json;x="a,b;c", application/openmetrics-text',
        'application/openmetrics-text;x=", text/plain;q=1";q=1.000',
        PROMETHEUS,
    ],
)
def test_openmetrics_is_sent_if_it_is_preferred(accept: str) -> None:
    assert kind(accept) == "application/openmetrics-text"


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "text/plain",
        "text/*",
        "application/json",
        "application/openmetrics-text;q=0",
        "application/openmetrics-text;q=0.0, */*",
        "text/plain, application/openmetrics-text",
        "text/plain;version=0.0.4, application/openmetrics-text;q=0.9",
        "application/openmetrics-text;version=0.0.1",
        "application/openmetrics-text;version=9.9.9",
        "application/openmetrics-text;version=x",
        'application/openmetrics-text;version="1.0.0',
        "application/openmetrics-text;version=1.0.0\r\nX: y",
        "application/openmetrics-text;q=2",
        "application/openmetrics-text;q=x",
        ";;,,;q=1,=,",
    ],
)
def test_the_text_format_is_sent_otherwise(accept: str) -> None:
    assert kind(accept) == "text/plain"


@pytest.mark.parametrize(
    ("accept_encoding", "compressed"),
    [
        ("gzip", True),
        ("x-gzip", True),
        ("GZIP", True),
        ("*", True),
        ("deflate, gzip;q=0.5", True),
        ("gzip;q=0.5, identity;q=0.4", True),
        ("identity;q=0, gzip;q=0.001", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; Q=0.000", False),
        ("gzip;q=0, *", False),
        ("*;q=0", False),
        ("gzip;q=0.5, identity", False),
        ("br", False),
        ("gzip;q=nonsense", False),
    ],
)
def test_the_content_is_compressed_if_gzip_is_acceptable(accept_encoding: str, compressed: bool) -> None:
    headers, body = expose(REGISTRY, "", accept_encoding)
    assert (dict(headers).get("Content-Encoding") == "gzip") is compressed
    text = gzip.decompress(body) if compressed else body
    assert b"\navap_cache_size 2.0\n" in text
    assert dict(headers)["Vary"] == "Accept, Accept-Encoding"


def test_names_restrict_the_metrics() -> None:
    _, body = expose(REGISTRY, "", "gzip", ["avap_cache_size"])
    assert b"avap_cache_size 2.0\n" in body
    assert b"avap_ready" not in body


@given(st.text(st.sampled_from('abtx/*;,="\\ q01.\r\n\x00é'), max_size=60), st.text(max_size=20))
def test_any_fields_get_an_answer(accept: str, accept_encoding: str) -> None:
    headers, body = expose(REGISTRY, f"application/openmetrics-text;{accept}", accept_encoding, ["avap_ready"])
    assert body
    assert not [value for _, value in headers if "\n" in value or "\r" in value]
