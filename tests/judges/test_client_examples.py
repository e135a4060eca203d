"""Every client of docs/clients.md, exactly as printed there, reads a catalogue above 4 MiB, in cleartext and over
TLS."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from grpc_tools import protoc
from tests.judges.tools import CACHE, HERE, command, may_build
from tests.support.builds import BuildFailed, built, make
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.providers import DatabaseServer, create_database, drop_database
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

pytestmark = may_build

ROOT = HERE.parents[1]
PAGE = ROOT / "docs/clients.md"
PROTO = ROOT / "service/definition_server/proto"
COUNT, OCTETS = 2500, 2000
SECONDS = 60


def examples() -> dict[str, str]:
    """File → its text on the page."""
    found = re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return dict(found)


def compiled(language: str, fill: Callable[[Path], None]) -> Path:
    """The build of one example, kept for each state of the page, of the contract and of the locked versions."""
    inputs = CACHE / "example-inputs" / language
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir(parents=True)
    for name, text in examples().items():
        (inputs / name).write_text(text, encoding="utf-8")
    for file in (PROTO / "avap.proto", HERE / "examples/pom.xml", HERE / "go/go.mod", HERE / "js/package-lock.json"):
        shutil.copy(file, inputs)
    try:
        return built(inputs, CACHE, fill)
    except BuildFailed as error:
        pytest.fail(str(error), pytrace=False)


def python_client() -> tuple[list[str], Path]:
    def fill(out: Path) -> None:
        (out / "client.py").write_text(examples()["client.py"], encoding="utf-8")
        assert protoc.main(["", f"-I{PROTO}", f"--python_out={out}", f"--grpc_python_out={out}", "avap.proto"]) == 0

    out = compiled("python", fill)
    return [sys.executable, str(out / "client.py")], out


def node_client() -> tuple[list[str], Path]:
    npm, node = command("npm", "Debian npm"), command("node", "Debian nodejs")

    def fill(out: Path) -> None:
        for file in (HERE / "js/package.json", HERE / "js/package-lock.json", PROTO / "avap.proto"):
            shutil.copy(file, out)
        (out / "client.js").write_text(examples()["client.js"], encoding="utf-8")
        make([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], out)

    out = compiled("node", fill)
    return [node, "client.js"], out


def go_client() -> tuple[list[str], Path]:
    go = command("go", "Go 1.26")

    def fill(out: Path) -> None:
        plugin, messages = out / "protoc-gen-go", out / "avap"
        make([go, "build", "-o", str(plugin), "google.golang.org/protobuf/cmd/protoc-gen-go"], HERE / "go")
        messages.mkdir()
        options = ["--go_opt=paths=source_relative", "--go_opt=Mavap.proto=example/avap"]
        arguments = [f"--plugin=protoc-gen-go={plugin}", f"--go_out={messages}", *options, "avap.proto"]
        assert protoc.main(["", f"-I{PROTO}", *arguments]) == 0
        (out / "main.go").write_text(examples()["main.go"], encoding="utf-8")
        module = (HERE / "go/go.mod").read_text().replace("module judges", "module example")
        (out / "go.mod").write_text(module)
        shutil.copy(HERE / "go/go.sum", out)
        make([go, "build", "-buildvcs=false", "-o", "client", "."], out)

    out = compiled("go", fill)
    return [str(out / "client")], out


def java_client() -> tuple[list[str], Path]:
    maven, java = command("mvn", "Debian maven"), command("java", "Debian default-jdk-headless")

    def fill(out: Path) -> None:
        for folder, file in (("proto", PROTO / "avap.proto"), (".", HERE / "examples/pom.xml")):
            place = out / ("src/main/proto" if folder == "proto" else ".")
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        source = out / "src/main/java"
        source.mkdir(parents=True)
        (source / "Client.java").write_text(examples()["Client.java"], encoding="utf-8")
        make([maven, "-q", "-B", "process-classes"], out)

    out = compiled("java", fill)
    classes = f"{out}/target/classes:{out}/target/lib/*"
    return [java, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", classes, "Client"], out


CLIENTS = {"python": python_client, "node": node_client, "go": go_client, "java": java_client}


@dataclass(frozen=True, slots=True)
class Served:
    """A server with a large catalogue, and the address, key and certificates for its clients."""

    environment: dict[str, str]
    version: str
    a_hash: str


@pytest.fixture(scope="module", params=["cleartext", "tls"])
def served(
    request: pytest.FixtureRequest, postgres: DatabaseServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    name = f"examples_{request.param}"
    url = create_database(postgres.url, name)
    Table(url).add_commands(COUNT, size=OCTETS)
    settings, more = {"WORKERS": "1"}, {}
    if request.param == "tls":
        command("openssl", "Debian openssl")
        authority = Authority(tmp_path_factory.mktemp("authority"))
        shown = authority.sign("localhost")
        settings |= {"TLS_CERT_FILE": str(shown.cert), "TLS_KEY_FILE": str(shown.key)}
        more["CA_FILE"] = str(authority.cert)
    with ServerProcess(url, **settings) as server:
        server.wait_ready()
        broadcast = server.wait_log("Definitions Broadcasted")
        assert int(str(broadcast["bytes"])) > 4 * 1024 * 1024
        address = {"AVAP_SERVER": f"localhost:{server.port}", "API_KEY": KEY}
        a_hash = ""
        if request.param == "cleartext":
            with Client(server.port) as client:
                a_hash = client.get("command7").hash
        yield Served(address | more, str(broadcast["version_hash"]), a_hash)
    drop_database(postgres.url, name)


def test_the_page_has_a_client_for_each_stack() -> None:
    assert set(examples()) == {"client.py", "client.js", "main.go", "Client.java"}


@pytest.mark.parametrize("stack", CLIENTS)
def test_an_example_of_the_page_reads_a_definition_and_a_catalogue_above_4_mib(served: Served, stack: str) -> None:
    arguments, folder = CLIENTS[stack]()
    variables = {key: value for key, value in os.environ.items() if key != "CA_FILE"} | served.environment
    for name in ("command7", "nothing of that name"):
        done = subprocess.run(
            [*arguments, name], cwd=folder, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        if name == "command7":
            assert re.fullmatch(f"command7 {served.a_hash or '[0-9a-f]{64}'}", first)
        else:
            assert first == "Command 'nothing of that name' not found"
        assert second == f"{COUNT} {served.version}"
