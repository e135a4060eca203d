"""h2spec, the conformance suite for HTTP/2 (RFC 7540) and HPACK (RFC 7541), passes in full."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.judges.relay import relay
from tests.judges.tools import go_programs, may_build, run

pytestmark = may_build

CASES = 146
"""The number of cases of h2spec 2.2.1, including the strict one. It is the last version that Go's module proxy serves.
Version 2.6.0 has 147, because it divides hpack/2.3.3 into two cases: an index past the table, and a name's index past
it. Both are among the A23 cases of `test_differential.py`."""

DEVIATIONS: dict[str, str] = {}
"""Case → the reason why our answer differs."""

SECONDS = 170

PATHS = {
    "handler": "/grpc.testing.TestService/UnaryCall",
    "static method": "/judges.Rows/Ready",
    "unknown method": "/judges.Rows/Nothing",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_h2spec_passes_in_full(native: int, tmp_path: Path, path: str) -> None:
    judge(native, path, tmp_path / "report.xml", "-o", "1")


def test_h2spec_passes_in_full_over_tls(secure: int, tmp_path: Path) -> None:
    # With TLS a connection cannot be closed on one side only, so it ends up to a second after GOAWAY, when nothing can
    # be lost any more (RFC 9113 section 9.1). h2spec has to wait longer than that.
    judge(secure, PATHS["handler"], tmp_path / "report.xml", "-o", "3", "--tls", "--insecure")


def judge(port: int, path: str, report: Path, *options: str) -> None:
    """Run every case, including the strict one."""
    with relay(port) as relayed:
        arguments = ["-h", "127.0.0.1", "-p", str(relayed), "-P", path, "-S", "-j", str(report), *options]
        done = run([str(go_programs() / "h2spec"), *arguments], seconds=SECONDS)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {
        f"{case.get('package')}: {case.get('classname')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None or case.find("skipped") is not None
    }
    assert failed == set(DEVIATIONS), done.stdout
    assert len(cases) == CASES
