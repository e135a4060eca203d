"""The wheel as pip would install it: it contains the contract, and its metadata for a package index is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from definition_server.rpc import avap_pb2

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "service/definition_server/proto/avap.proto"


def test_uv_builds_a_clone_again_when_a_file_of_the_wheel_has_changed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    watched = [key["file"] for key in settings["tool"]["uv"]["cache-keys"]]
    found = {path for pattern in watched for path in ROOT.glob(pattern)}
    code = {path for path in (ROOT / "service").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in code - found if path.suffix not in (".pyi", ".typed", ".so")} == set()
    assert not any("__pycache__" in path.parts for path in found)


def python(*arguments: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-B", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_python_that_is_too_old_is_refused_in_one_line(tmp_path: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(re.sub(r'requires-python = ".*"', 'requires-python = ">=3.99"', text))
    for name in ("hatch_build.py", "README.md", "service"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-B", "-m", "hatchling", "build", "-t", "wheel"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"AVAP Definition Server needs Python >=3\.99, and this is Python 3\..*", done.stderr.strip())
    assert not (tmp_path / "dist").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    [built] = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    [found] = wheel.glob("*.dist-info/METADATA")
    return message_from_string(found.read_text(encoding="utf-8"))


def test_the_command_of_an_installed_wheel_prints_the_folder_of_the_contract(wheel: Path) -> None:
    # Run in the folder of the unpacked wheel, because `-m` prefers that folder to the environment's own installation.
    folder = Path(python("-m", "definition_server", "proto", cwd=wheel).strip())
    assert folder == wheel / "definition_server" / "proto"
    assert (folder / "avap.proto").read_bytes() == CONTRACT.read_bytes()


def test_protoc_makes_the_served_contract_of_the_wheel_s_file(wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "descriptors"
    folder = wheel / "definition_server" / "proto"
    assert protoc.main(["protoc", f"-I{folder}", f"--descriptor_set_out={out}", "avap.proto"]) == 0
    [compiled] = FileDescriptorSet.FromString(out.read_bytes()).file
    for field in (field for message in compiled.message_type for field in message.field):
        field.ClearField("json_name")  # protoc writes it here, but not into generated code
    served = FileDescriptorProto()
    avap_pb2.DESCRIPTOR.CopyToProto(served)
    served.name = compiled.name  # the generated module has the path of its package
    assert compiled == served


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    service = ROOT / "service"
    packages = ("definition_server", "grpc_h2")
    kept = {path.relative_to(service) for name in packages for path in (service / name).rglob("*") if path.is_file()}
    packed = {path.relative_to(wheel) for name in packages for path in (wheel / name).rglob("*.*")}
    packed, kept = ({path for path in paths if "__pycache__" not in path.parts} for paths in (packed, kept))
    assert {path for path in packed if path.suffix} == kept
    assert {path.name.partition("-")[0] for path in wheel.iterdir()} == {*packages, "avap_definition_server"}


def test_the_metadata_name_each_supported_python(metadata: Message) -> None:
    versions = {each.rpartition(" ")[2] for each in metadata.get_all("Classifier", ()) if ":: 3." in each}
    assert versions == {"3.11", "3.12", "3.13", "3.14"}
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"grpc", "postgresql"} <= set(metadata["Keywords"].split(","))


def links(address: str | None) -> dict[str, str]:
    """The links of a build with that ``PROJECT_URL``."""
    variables = {name: value for name, value in os.environ.items() if name != "PROJECT_URL"}
    if address is not None:
        variables["PROJECT_URL"] = address
    printed = subprocess.run(
        [sys.executable, "-B", "-m", "hatchling", "metadata"],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    urls: dict[str, str] = json.loads(printed).get("urls", {})
    return urls


def test_links_of_the_project_are_made_from_the_address_given_to_the_build() -> None:
    given = links("https://forge.example/avap/definition-server/")
    assert given["Homepage"] == "https://forge.example/avap/definition-server"
    for name, place in (
        ("Documentation", "docs/README.md"),
        ("Changelog", "CHANGELOG.md"),
        ("Security", "SECURITY.md"),
    ):
        assert given[name] == f"{given['Homepage']}/blob/HEAD/{place}"
        assert (ROOT / place).exists()


@pytest.mark.parametrize("address", [None, ""])
def test_a_build_that_is_given_no_address_has_no_links(address: str | None) -> None:
    assert links(address) == {}


def test_an_invalid_address_fails_the_build_with_a_remedy() -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        links("forge.example/avap")
    assert "PROJECT_URL is 'forge.example/avap': set it to the address of the repository" in failed.value.stderr


def readme_of(address: str | None) -> str:
    """The README in the form that a package index shows."""
    variables = {name: value for name, value in os.environ.items() if name != "PROJECT_URL"}
    return subprocess.run(
        [sys.executable, "-B", "-m", "hatchling", "metadata", "readme"],
        cwd=ROOT, env=variables | ({} if address is None else {"PROJECT_URL": address}), capture_output=True, text=True,
        timeout=60, check=True,
    ).stdout  # fmt: skip


def test_links_of_the_readme_work_on_the_page_of_an_index() -> None:
    shown = readme_of("https://forge.example/avap")
    targets = re.findall(r"\]\(([^)\s]+)\)", shown)
    assert len(targets) > 20
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert "](https://forge.example/avap/blob/HEAD/docs/clients.md)" in shown
    assert "](https://forge.example/avap/raw/HEAD/docs/architecture.svg)" in shown


def test_a_build_without_an_address_leaves_the_links_of_the_readme_unchanged(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_contract_is_also_found_at_the_place_that_old_scripts_use() -> None:
    assert (ROOT / "proto" / "avap.proto").samefile(CONTRACT)
