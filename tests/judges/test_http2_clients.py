"""Plain HTTP/2 clients that do not know gRPC are served: nghttp and h2load of nghttp2, and curl.

They use features that gRPC clients do not use: padding, CONTINUATION, priorities, a header table of zero octets,
content-length.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.judges.tools import command, run
from tests.support.h2_wire import grpc_message

MESSAGE = grpc_message(bytes(range(256)) * 8)
GRPC = ("-H", "content-type: application/grpc", "-H", "te: trailers")
SECONDS = 60
PATHS = {"handler": "/judges.Rows/Unary", "static method": "/judges.Rows/Ready"}

NGHTTP = {
    "plain": (),
    "padding and continuation": ("-b", "64", "--continuation"),
    "no header table": ("--header-table-size=0",),
    "a header table that shrinks and grows": ("--header-table-size=0", "--header-table-size=4096"),
    "small windows": ("-w", "10", "-W", "10"),
    "all of it": ("-b", "64", "--continuation", "--header-table-size=0", "-w", "10"),
}

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@pytest.fixture
def body(tmp_path: Path) -> str:
    path = tmp_path / "body"
    path.write_bytes(MESSAGE)
    return str(path)


@pytest.mark.requirement("A18", "C-nghttp-padding", "C-nghttp-table-size", "C-nghttp-priority")
@paths
@pytest.mark.parametrize("options", NGHTTP.values(), ids=NGHTTP)
def test_nghttp_gets_the_message_and_the_status(roomy: int, body: str, path: str, options: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{roomy}{path}"
    done = run([command("nghttp", "Debian nghttp2-client"), "-nv", "-d", body, *GRPC, *options, url], seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    told = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert sum(map(int, re.findall(r"recv DATA frame <length=(\d+)", told))) == len(MESSAGE), told
    assert ":status: 200" in told
    assert "grpc-status: 0" in told
    assert "recv RST_STREAM" not in told
    assert "recv GOAWAY" not in told


@pytest.mark.requirement("C-curl")
@paths
def test_curl_with_prior_knowledge_gets_the_message(native: int, body: str, tmp_path: Path, path: str) -> None:
    out = tmp_path / "out"
    url = f"http://127.0.0.1:{native}{path}"
    arguments = ["-sS", "--http2-prior-knowledge", "--data-binary", f"@{body}", *GRPC, "-D", "-", "-o", str(out), url]
    done = run([command("curl", "Debian curl"), *arguments], seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == MESSAGE
    assert done.stdout.startswith("HTTP/2 200")
    assert "grpc-status: 0" in done.stdout


@pytest.mark.requirement("A1")
def test_curl_and_nghttp_choose_http2_over_tls(secure: int, body: str) -> None:
    url = f"https://127.0.0.1:{secure}{PATHS['handler']}"
    arguments = ["-sSk", "--http2", "--data-binary", f"@{body}", *GRPC, "-D", "-", "-o", "/dev/null", url]
    done = run([command("curl", "Debian curl"), *arguments], seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("HTTP/2 200")
    assert "grpc-status: 0" in done.stdout
    done = run([command("nghttp", "Debian nghttp2-client"), "-nv", "-d", body, *GRPC, url], seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "The negotiated protocol: h2" in done.stdout
    assert re.search(r"grpc-status.*: 0", done.stdout)


@pytest.mark.requirement("A33")
@pytest.mark.parametrize(("extra", "status"), [((), "415"), (("-X", "GET"), "405")], ids=["no gRPC", "no POST"])
def test_curl_gets_the_reason_of_a_refusal(native: int, body: str, extra: tuple[str, ...], status: str) -> None:
    url = f"http://127.0.0.1:{native}{PATHS['handler']}"
    arguments = ["-sS", "--http2-prior-knowledge", "--data-binary", f"@{body}", *extra, "-w", "\n%{http_code}", url]
    done = run([command("curl", "Debian curl"), *arguments], seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    text, _, code = done.stdout.rpartition("\n")
    assert code == status
    assert len(text) >= 16


@pytest.mark.requirement("A33", "A45")
def test_curl_gets_the_reason_of_a_refusal_that_arrives_before_it_has_sent_its_body(native: int) -> None:
    url = f"http://127.0.0.1:{native}{PATHS['handler']}"
    arguments = ["-sS", "--http2-prior-knowledge", "-X", "POST", "-T", "-", "-w", "\n%{http_code}", url]
    script = '(printf a; sleep 0.3; printf b) | "$@"'
    done = run(["sh", "-c", script, "sh", command("curl", "Debian curl"), *arguments], seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n415")


@pytest.mark.requirement("C-h2load-first-flight")
@paths
def test_h2load_gets_every_answer(native: int, body: str, path: str) -> None:
    url = f"http://127.0.0.1:{native}{path}"
    load = ("-c8", "-m32", "-n4000")
    done = run([command("h2load", "Debian nghttp2-client"), *load, "-d", body, *GRPC, url], seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "4000 succeeded, 0 failed, 0 errored, 0 timeout" in done.stdout
    assert "status codes: 4000 2xx, 0 3xx, 0 4xx, 0 5xx" in done.stdout
