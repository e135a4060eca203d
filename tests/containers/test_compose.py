"""deploy/compose.yaml: its promises, and the whole stack."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.containers.engine import IMAGE, ROOT, base_image, missing, need_image
from tests.support.client import Client
from tests.support.polling import until

from definition_server.cli.embedded_postgres import free_port
from definition_server.environment import variables
from definition_server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import docker

FILE = ROOT / "deploy/compose.yaml"
POSTGRES = os.environ.get("POSTGRES_IMAGE") or "postgres:16-alpine"
SERVER = "definition-server"
COMPOSE_SECONDS = 120


def compose_command() -> list[str]:
    """The command for Compose on this machine, version 2 or 1."""
    if shutil.which("docker"):
        asked = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30)
        if asked.returncode == 0:
            return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    missing("Docker Compose (Debian docker-compose)")
    raise AssertionError


class Project:
    """One run of the stack under a unique name."""

    def __init__(self, settings: Mapping[str, str], *overrides: Path) -> None:
        self._name = f"definition-server-test-{secrets.token_hex(4)}"
        self._environment = os.environ | settings
        self._files = [part for path in (FILE, *overrides) for part in ("-f", str(path))]

    def run(self, *arguments: str) -> str:
        """Output of one Compose command, which must succeed."""
        done = subprocess.run(
            [*compose_command(), "-p", self._name, *self._files, *arguments],
            cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=COMPOSE_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def make_secrets(directory: Path) -> Path:
    """Run the command that an operator has to run first."""
    for parent in directory.parents:
        if not parent.name.startswith("pytest-"):
            break
        parent.chmod(0o711)
    subprocess.run([str(ROOT / "deploy/compose/make-secrets"), str(directory)], check=True, capture_output=True)
    return directory


@pytest.fixture
def secrets_directory(tmp_path: Path) -> Path:
    return make_secrets(tmp_path / "secrets")


@pytest.fixture
def services(secrets_directory: Path) -> dict[str, Any]:
    """The services, as Compose itself reads the file."""
    import yaml

    told = yaml.safe_load(Project({"SECRETS_DIR": str(secrets_directory)}).run("config"))
    return dict(told["services"])


def environment(service: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in service["environment"].items()}


def test_every_port_is_published_on_the_loopback_address_only(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 4
    hosts = [port["host_ip"] if isinstance(port, dict) else port.split(":")[0] for port in published]
    assert set(hosts) == {"127.0.0.1"}


def test_grafana_is_provisioned_with_the_dashboard_and_the_stacks_prometheus(secrets_directory: Path) -> None:
    import yaml

    more = ROOT / "deploy/compose/grafana.yaml"
    services = yaml.safe_load(Project({"SECRETS_DIR": str(secrets_directory)}, more).run("config"))["services"]
    grafana, prometheus = services["grafana"], services["prometheus"]
    for port in grafana["ports"]:
        assert (port["host_ip"] if isinstance(port, dict) else port.split(":")[0]) == "127.0.0.1"
    mounted = {}
    for volume in grafana["volumes"]:
        source, target = (volume["source"], volume["target"]) if isinstance(volume, dict) else volume.split(":")[:2]
        assert Path(source).exists()
        mounted[target] = Path(source)
    provisioning = mounted["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    port = prometheus["ports"][0]
    inner = port["target"] if isinstance(port, dict) else port.split(":")[-1].partition("/")[0]
    assert source["url"] == f"http://prometheus:{inner}"
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
    (provider,) = yaml.safe_load((provisioning / "dashboards/definition-server.yml").read_text())["providers"]
    assert f"{provider['options']['path']}/definition-server.json" in mounted
    told = environment(grafana)
    assert told["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert told["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


def test_the_server_runs_with_minimal_privileges(services: dict[str, Any]) -> None:
    server = services[SERVER]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in server
    assert server["user"] == "10001:0", "the image's own account, unless the secrets belong to another"


def test_every_variable_of_the_server_is_a_setting_and_secrets_are_files(services: dict[str, Any]) -> None:
    known = {name for field in Settings.model_fields.values() for name in variables(field)}
    names = set(environment(services[SERVER]))
    assert {name.removesuffix("_FILE") for name in names} <= known
    assert {"DATABASE_URL_FILE", "API_KEY_FILE"} <= names
    assert not names & {"DATABASE_URL", "API_KEY", "AVAP_INTERNAL_KEY"}


def test_the_stack_does_not_ask_for_a_higher_limit_of_open_files(services: dict[str, Any]) -> None:
    """An engine refuses to raise the limit above its own, so the file must not ask for it."""
    assert "ulimits" not in services[SERVER]


def test_each_of_several_servers_has_its_own_ports_and_sockets(secrets_directory: Path) -> None:
    import yaml

    settings = {"SECRETS_DIR": str(secrets_directory), "PORT": "50051-50053", "METRICS_PORT": "9464-9466"}
    server = yaml.safe_load(Project(settings).run("config"))["services"][SERVER]
    ranges = [port if isinstance(port, str) else f"{port['host_ip']}:{port['published']}" for port in server["ports"]]
    assert {"50051-50053", "9464-9466"} <= {each.split(":")[1] for each in ranges} or len(ranges) == 6
    assert "container_name" not in server
    folder = Path(environment(server)["CONTROL_SOCKET"]).parent
    assert [str(folder)] == [str(each).split(":")[0] for each in server["tmpfs"]]
    assert not any(str(folder) in str(volume) for volume in server["volumes"])


def test_prometheus_expects_the_catalogue_of_the_stack(services: dict[str, Any]) -> None:
    """The cache-size alert is made for large catalogues; the setting keeps it silent for the few rows of the stack."""
    import yaml

    [rule] = yaml.safe_load((ROOT / "deploy/compose/expectation.yml").read_text())["groups"][0]["rules"]
    rows = (ROOT / "deploy/compose/catalogue.sql").read_text().count("', 'function', '")
    assert (rule["record"], rule["expr"]) == ("job:avap_cache_size:expected", f"vector({rows})")
    configured = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert rule["labels"] == {"job": configured["scrape_configs"][0]["job_name"]}
    assert "local/*.yml" in configured["rule_files"]
    assert any("/etc/prometheus/local/expectation.yml" in str(each) for each in services["prometheus"]["volumes"])


def test_the_stop_grace_period_is_longer_than_a_drain(services: dict[str, Any]) -> None:
    grace = str(services[SERVER]["stop_grace_period"])
    assert grace.endswith("s")
    drain = Settings.model_fields["drain_timeout_seconds"].default
    assert float(grace.removesuffix("s")) >= drain + 5


def test_secrets_are_made_once_and_not_overwritten(tmp_path: Path) -> None:
    directory = make_secrets(tmp_path / "made")
    files = {path.name: path.read_text() for path in directory.iterdir()}
    assert files.keys() == {"api-key", "database-url", "postgres-password", "reader-password"}
    assert len(set(files.values())) == 4
    assert f":{files['reader-password']}@database:5432/" in files["database-url"]
    again = subprocess.run(
        [str(ROOT / "deploy/compose/make-secrets"), str(directory)], capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "already has secrets" in again.stderr
    assert {path.name: path.read_text() for path in directory.iterdir()} == files


def prometheus_image(engine: docker.DockerClient) -> str:
    """``PROMETHEUS_IMAGE``, or an image of this machine's Prometheus on the base image, or the file's default."""
    named = os.environ.get("PROMETHEUS_IMAGE")
    program = shutil.which("prometheus")
    if named or program is None:
        default = named or "prom/prometheus:v3.5.0"
        need_image(engine, default, "PROMETHEUS_IMAGE; or Debian's prometheus on this machine")
        return default
    return _of_this_machine(engine, Path(program))


def _of_this_machine(engine: docker.DockerClient, program: Path) -> str:
    """An image of the Prometheus that is installed here, with its libraries, on our base image."""
    import io
    import tarfile

    tag = "definition-server-prometheus:test"
    loaded = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    libraries = [word for line in loaded.splitlines() for word in line.split() if word.startswith("/")]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        recipe = (
            f"FROM {base_image()}\nCOPY lib /opt/prometheus/lib\nCOPY prometheus /opt/prometheus/prometheus\n"
            "RUN mkdir -p /prometheus && chown 65534:65534 /prometheus\nUSER 65534\nWORKDIR /prometheus\n"
            'ENV LD_LIBRARY_PATH=/opt/prometheus/lib\nENTRYPOINT ["/opt/prometheus/prometheus"]\n'
            'CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]\n'
        ).encode()
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(recipe)
        archive.addfile(entry, io.BytesIO(recipe))
        archive.add(program.resolve(), "prometheus")
        directory = tarfile.TarInfo("lib")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(directory)
        for library in libraries:
            if "/ld-linux" not in library and not library.endswith("/libc.so.6"):
                archive.add(Path(library).resolve(), f"lib/{Path(library).name}")
    packed.seek(0)
    engine.images.build(fileobj=packed, custom_context=True, tag=tag, rm=True)
    return tag


@pytest.fixture
def stack(
    engine: docker.DockerClient, image: str, secrets_directory: Path, tmp_path: Path
) -> Iterator[tuple[Project, dict[str, int]]]:
    """The running stack and its published ports."""
    need_image(engine, POSTGRES, "POSTGRES_IMAGE")
    names = ("PORT", "METRICS_PORT", "POSTGRES_PORT", "PROMETHEUS_PORT")
    ports = {name: free_port() for name in names}
    settings = {
        "SECRETS_DIR": str(secrets_directory),
        "SERVER_UID": str(os.getuid() or 10001),
        "SERVER_IMAGE": IMAGE,
        "BASE_IMAGE": base_image(),
        "POSTGRES_IMAGE": POSTGRES,
        "PROMETHEUS_IMAGE": prometheus_image(engine),
        **{name: str(port) for name, port in ports.items()},
    }
    # PostgreSQL images differ in one respect: some do not read the password from a file.
    override = tmp_path / "password.json"
    password = (secrets_directory / "postgres-password").read_text()
    told = {"environment": {"POSTGRES_PASSWORD_FILE": "", "POSTGRES_PASSWORD": password}}
    override.write_text(json.dumps({"version": "3.8", "services": {"database": told}}))
    project = Project(settings, override)
    try:
        project.run("up", "-d", "--no-build")
        yield project, ports
    finally:
        project.run("down", "-v", "-t", "20")


def ask(port: int, query: str) -> list[dict[str, Any]]:
    """The result of an instant query to Prometheus; empty while Prometheus does not answer."""
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return list(json.load(answer)["data"]["result"])
    return []


@pytest.mark.timeout(300)
def test_the_whole_stack_starts_and_serves(stack: tuple[Project, dict[str, int]], secrets_directory: Path) -> None:
    project, ports = stack
    key = (secrets_directory / "api-key").read_text()
    with Client(ports["PORT"], key=key) as client:
        until(lambda: client.health() == "SERVING", lambda: project.run("logs"), seconds=90)
        assert {command.name for command in client.sync().commands} == {"addVar", "length", "upper"}
        assert client.get("upper").code.endswith(b".upper()")
    until(
        lambda: [found["value"][1] for found in ask(ports["PROMETHEUS_PORT"], "avap_cache_size")] == ["3"],
        lambda: project.run("logs", "prometheus"),
        seconds=60,
    )
    rules = f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}/api/v1/rules"
    with urllib.request.urlopen(rules, timeout=5) as answer:
        groups = json.load(answer)["data"]["groups"]
    assert "definition-server.expectation" in {group["name"] for group in groups}, "the alerts are loaded"
