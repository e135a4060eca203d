"""The Docker engine, the image and the containers of these tests; only the image is left behind.

Without an engine or a base image, a test is skipped with the reason; it fails if ``CI`` is set.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import pytest
from tests.support.polling import until
from tests.support.server import KEY

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

ROOT = Path(__file__).parents[2]
IMAGE = "definition-server:test"
LABEL = "org.testcontainers=true"
"""Label of all containers; CI removes containers of a killed run by it, as it does for testcontainers."""

GRPC, ADMIN = 50051, 9464
"""The server's ports inside a container."""

COMMANDS = 30
"""Rows of a test's table, ``command0`` and so on."""

ENGINE_SECONDS = 60
BUILD_SECONDS = 600
_BUILD_ARGUMENTS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT", "PIP_RETRIES")

NOFILE = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
"""An engine that cannot raise limits (one inside a container) grants at most its own limit."""

HARDENED: dict[str, Any] = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "ulimits": [{"Name": "nofile", "Soft": NOFILE, "Hard": NOFILE}],
}
"""The options to run the server with: docs/containers.md has the same flags."""


def base_image() -> str:
    """The base image: ``BASE_IMAGE``, or the Dockerfile's default."""
    return os.environ.get("BASE_IMAGE") or "python:3.12-slim"


def build_image() -> str:
    """The image in which the wheel is built: ``BUILD_IMAGE``, or the Dockerfile's default."""
    return os.environ.get("BUILD_IMAGE") or base_image()


def missing(what: str) -> Any:
    """Fail in CI, skip elsewhere."""
    told = f"the image cannot be tested: {what}"
    if os.environ.get("CI"):
        pytest.fail(told, pytrace=False)
    pytest.skip(told)


def engine_or_skip() -> docker.DockerClient:
    """A client of a Docker engine that answers; the caller closes it."""
    import docker

    try:
        return docker.from_env(timeout=ENGINE_SECONDS)
    except docker.errors.DockerException as error:
        return cast("docker.DockerClient", missing(f"no Docker engine answers: {error}"))


def need_image(engine: docker.DockerClient, image: str, variable: str) -> None:
    """Make sure that ``image`` exists or can be pulled; ``variable`` is the setting that names it."""
    from docker.errors import DockerException, ImageNotFound

    with contextlib.suppress(ImageNotFound):
        engine.images.get(image)
        return
    try:
        engine.images.pull(image)
    except DockerException as error:
        missing(f"the image {image} ({variable}) is not present and cannot be pulled: {error}")


def build(engine: docker.DockerClient, tag: str = IMAGE, **arguments: str) -> tuple[str, str]:
    """Build the image as in docs/containers.md, with the classic builder, which every engine has; ``arguments`` replace
    the default arguments of the build. Returns the id of the image and the output."""
    done = run_build(tag, REVISION="abc", **arguments)
    if done.returncode:
        pytest.fail(f"the image was not built:\n{done.stdout[-3000:]}{done.stderr[-3000:]}", pytrace=False)
    return str(engine.images.get(tag).id), done.stdout + done.stderr


def run_build(tag: str, *options: str, **arguments: str) -> subprocess.CompletedProcess[str]:
    """``docker build`` with what this environment needs. Fails if docker is missing."""
    given = {name: value for name in _BUILD_ARGUMENTS if (value := os.environ.get(name))}
    given |= {"BASE_IMAGE": base_image(), "BUILD_IMAGE": build_image()} | arguments
    command = ["docker", "build", "-t", tag, *options]
    for name, value in given.items():
        command += ["--build-arg", f"{name}={value}"]
    environment = os.environ | {"DOCKER_BUILDKIT": "0"}
    try:
        return subprocess.run(
            [*command, "."], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=BUILD_SECONDS
        )
    except FileNotFoundError:
        return cast("subprocess.CompletedProcess[str]", missing("the docker command (Debian docker.io, docker-cli)"))


class Running:
    """One container, as a context manager that removes it and its anonymous volumes."""

    def __init__(self, engine: docker.DockerClient, image: str, command: Sequence[str] = (), **options: Any) -> None:
        self._engine = engine
        self.container: Container = engine.containers.create(
            image, list(command) or None, labels={"org.testcontainers": "true"}, **options
        )

    def __enter__(self) -> Self:
        try:
            self.container.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Kill the container if it runs, and remove it; no error if it was removed before."""
        from docker.errors import NotFound

        with contextlib.suppress(NotFound):
            self.container.remove(force=True, v=True)

    @property
    def state(self) -> dict[str, Any]:
        """``State`` of ``docker inspect``."""
        self.container.reload()
        return cast("dict[str, Any]", self.container.attrs["State"])

    def inspect(self) -> dict[str, Any]:
        """All of ``docker inspect``."""
        self.container.reload()
        return cast("dict[str, Any]", self.container.attrs)

    def output(self) -> str:
        """The output on stdout and stderr so far."""
        return self.container.logs().decode()

    def lines(self) -> list[dict[str, Any]]:
        """The output as log lines; each line must be one JSON object."""
        return [json.loads(line) for line in self.output().splitlines()]

    def logged(self, message: str) -> list[dict[str, Any]]:
        """Log lines with that ``msg``."""
        return [line for line in self.lines() if line["msg"] == message]

    def wait_log(self, message: str, seconds: float = 30) -> dict[str, Any]:
        """Wait for the first such line, and return it."""
        return until(lambda: self.logged(message), lambda: f"{message!r}:\n{self.output()}", seconds=seconds)[0]

    def wait_exit(self, seconds: float = 30) -> int:
        """Wait until the container has exited by itself. Returns its exit code."""
        until(lambda: not self.state["Running"], lambda: f"the container still runs:\n{self.output()}", seconds=seconds)
        return int(self.state["ExitCode"])

    def execute(self, *command: str) -> str:
        """The output of a command inside the container; the command must succeed."""
        code, output = self.container.exec_run(list(command))
        assert code == 0, output.decode()
        return str(output.decode())

    def port(self, inside: int) -> int:
        """The published port on 127.0.0.1."""
        bindings = self.inspect()["NetworkSettings"]["Ports"][f"{inside}/tcp"]
        assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}
        return int(bindings[0]["HostPort"])


@contextlib.contextmanager
def user_network(engine: docker.DockerClient) -> Iterator[str]:
    """Name of a network on which containers find each other by alias."""
    name = f"definition-server-test-{secrets.token_hex(4)}"
    network = engine.networks.create(name, driver="bridge", labels={"org.testcontainers": "true"})
    try:
        yield name
    finally:
        network.remove()


class Secrets:
    """A directory of secrets as a container engine mounts it: one file each, readable by the server's account."""

    def __init__(self, directory: Path, database_url: str) -> None:
        self.directory = directory
        directory.chmod(0o755)
        self.write("database-url", database_url)
        self.write("api-key", KEY)

    def write(self, name: str, text: str) -> None:
        """Write a secret or replace it; the file is replaced as a whole, as Kubernetes does it."""
        new = self.directory / f".{name}.new"
        new.write_text(f"{text}\n")
        new.chmod(0o444)
        new.replace(self.directory / name)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for `Running`."""
        return {
            "volumes": {str(self.directory): {"bind": "/run/secrets", "mode": "ro"}},
            "environment": {"DATABASE_URL_FILE": "/run/secrets/database-url", "API_KEY_FILE": "/run/secrets/api-key"},
        }
