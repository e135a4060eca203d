"""`.ci/run` with stand-ins for all programs: which stages run side by side, which packages are installed, and the
effects of failures."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 50
TOOLS = "bash cat dirname env head ln ls mkdir mktemp readlink realpath renice rm sed sh sleep timeout touch wc xargs"
COMMANDS = (
    "apt-get cargo cc chromium curl debootstrap docker docker-compose dockerd faketime go haproxy java jq mvn nghttp"
    " nghttpd nginx node npm openssl pg_ctlcluster prometheus python3 python3-headers ruby"
)
README = """<!-- tests -->
```sh
mkdir -p .venv && ln -s ../stand-ins .venv/bin && .venv/bin/nox -s tests
```
"""
STAND_IN = """#!/bin/bash
name=${0##*/}
printf '%s\\n' "$name $*" >>"$STAGE/calls"
"""
MEET = """
meet() { # a stage that goes on when the other one has begun: both run at the same time
    local left=$((SECONDS + 20))
    until [ -e "$STAGE/$1.begun" ]; do
        [ "$SECONDS" -lt "$left" ] || { echo "$1 has not begun"; exit 9; }
        sleep 0.01
    done
}
"""
NOX = (
    STAND_IN
    + MEET
    + """
touch "$STAGE/$2.begun"
case ${MEETS-} in *" $2:"*) other=${MEETS#* "$2":}; meet "${other%% *}" ;; esac
echo "output of $2"
case " ${FAILING-} " in *" $2 "*) exit 1 ;; esac
"""
)
PYTHON = (
    STAND_IN
    + """
case "$*" in
    *version_info*) echo 3.11 ;;
    *failed-alone*)
        printf '%s\\n' "again $0 $*" >>"$STAGE/calls"
        [ "$2" != "${BROKEN-}" ] || exit 1 ;;
esac
"""
)


class Machine:
    """A machine on which `.ci/run` finds stand-ins for programs, in a separate project."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.project, self.programs = folder, folder / "project", folder / "project/stand-ins"
        self.programs.mkdir(parents=True)
        (self.project / "README.md").write_text(README)
        (self.project / ".ci").mkdir()
        shutil.copy(ROOT / ".ci/run", self.project / ".ci/run")
        for name in COMMANDS.split():
            self.put(self.programs / name, STAND_IN)
        for name in TOOLS.split():
            (self.programs / name).symlink_to(shutil.which(name) or name)
        self.put(self.programs / "id", "#!/bin/sh\necho 0\n")
        self.put(self.programs / "nox", NOX)
        self.put(self.programs / "python", PYTHON)
        self.put(self.project / ".ci/image-with-compiler", STAND_IN)
        for environment in ("python3.11", "python3.11-compiled"):
            self.put(self.project / ".nox" / environment / "bin/python", PYTHON)
        self.put(folder / "shared/python/with-debian", STAND_IN)
        self.put(folder / "shared/docker/start-engine", STAND_IN + 'mkdir -p "$1"; echo unix:///engine\n')
        self.put(folder / "shared/docker/build-local-images", STAND_IN)

    @staticmethod
    def put(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, **variables: str) -> tuple[int, str]:
        """Exit code and output of `.ci/run`."""
        environment = {
            "PATH": str(self.programs), "HOME": str(self.folder), "TMPDIR": str(self.folder),
            "STAGE": str(self.folder), "PYTHON_ROOTS": str(self.folder / "roots"),
        }  # fmt: skip
        done = subprocess.run(
            [self.project / ".ci/run"], env=environment | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert not list(self.folder.glob("tmp.*")), "the working directory is removed"
        return done.returncode, done.stdout

    def calls(self, start: str) -> list[str]:
        """Calls of stand-ins that begin with these words."""
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(start)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_all_stages_run_and_the_output_of_parallel_stages_is_printed(machine: Machine) -> None:
    code, output = machine.run(MEETS=" containers:judges compiled:containers deploy:judges judges:simulation ")
    assert code == 0, output
    once = ["tests", "lint", "coverage", "fuzz", "compiled", "containers", "simulation", "deploy"]
    sessions = [*once, "judges", "judges", "chaos", "chaos"]
    assert sorted(call.split()[2] for call in machine.calls("nox -s")) == sorted(sessions)
    for session in sessions:
        assert f"output of {session}\n" in output
    assert machine.calls("with-debian") == ["with-debian sid true", "with-debian sid .ci/newest-python"]
    assert machine.calls("python -m perf") == [
        "python -m perf attacks --short --no-record", "python -m perf measure --quick --no-record --attempts 3",
    ]  # fmt: skip
    assert machine.calls("again") == []


def test_a_stage_that_fails_in_parallel_runs_again_with_its_own_python(machine: Machine) -> None:
    code, output = machine.run(FAILING="compiled judges deploy containers simulation", MEETS="")
    assert code == 1, "the judge of the load generator fails, too, and does not run beside others"
    environments = machine.project / ".nox"
    assert machine.calls("again") == [
        f"again {environments}/python3.11-compiled/bin/python .ci/failed-alone "
        ".pytest_cache/compiled/v/cache/lastfailed --engine=compiled",
        *(
            f"again {environments}/python3.11/bin/python .ci/failed-alone .pytest_cache/{session}/v/cache/lastfailed"
            for session in ("judges", "deploy", "containers", "simulation")
        ),
    ], output


@pytest.mark.parametrize("session", ["compiled", "deploy", "containers", "simulation"])
def test_a_test_that_fails_again_alone_fails_ci(machine: Machine, session: str) -> None:
    lastfailed = f".pytest_cache/{session}/v/cache/lastfailed"
    assert machine.run(FAILING=session)[0] == 0
    code, output = machine.run(FAILING=session, BROKEN=lastfailed)
    assert code == 1
    assert "== Done in" not in output


@pytest.mark.parametrize("session", ["tests", "lint", "coverage", "fuzz", "chaos"])
def test_a_stage_that_fails_ends_ci(machine: Machine, session: str) -> None:
    code, output = machine.run(FAILING=session)
    assert code == 1
    assert "== Done in" not in output


def test_stages_that_run_in_parallel_to_a_failed_one_are_ended_and_their_output_is_printed(machine: Machine) -> None:
    begun = 'echo "the root file system"; echo "$BASHPID" >"$STAGE/pid"; touch "$STAGE/root.begun"; exec sleep 1000\n'
    machine.put(machine.folder / "shared/python/with-debian", STAND_IN + begun)
    code, output = machine.run(FAILING="tests", MEETS=" tests:root ")
    assert code == 1
    assert "== not finished: root\nthe root file system\n" in output
    pid = int((machine.folder / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_root_file_system_that_cannot_be_made_fails_ci(machine: Machine) -> None:
    machine.put(machine.folder / "shared/python/with-debian", STAND_IN + 'echo "no mirror"; exit 1\n')
    code, output = machine.run()
    assert code == 1
    assert "no mirror\nno root file system of Debian sid can be made\n" in output


def test_missing_packages_are_installed_by_two_calls(machine: Machine) -> None:
    for name in ("debootstrap", "cc", "jq", "mvn"):
        (machine.programs / name).unlink()
    code, output = machine.run()
    assert code == 0, output
    how = "apt-get install -y -qq --no-install-recommends"
    assert machine.calls("apt-get") == [
        "apt-get update -qq", f"{how} debootstrap gcc libc6-dev", f"{how} maven default-jdk-headless jq",
    ]  # fmt: skip


def test_an_ordinary_user_gets_a_list_of_all_missing_packages(machine: Machine) -> None:
    machine.put(machine.programs / "id", "#!/bin/sh\necho 1000\n")
    for name in ("jq", "mvn"):
        (machine.programs / name).unlink()
    code, output = machine.run()
    assert code == 1
    assert "missing: maven default-jdk-headless jq; install it, or run as root\n" in output


@pytest.mark.parametrize("fails", ["", "build-local-images"])
def test_without_a_docker_engine_one_is_started_and_the_base_images_must_be_made(machine: Machine, fails: str) -> None:
    machine.put(machine.programs / "docker", STAND_IN + '[ "$1" != info ]\n')
    engine = 'mkdir -p "$1"; touch "$1/docker.pid"; (sleep 0.1; rm "$1/docker.pid") >/dev/null & echo unix:///engine\n'
    machine.put(machine.folder / "shared/docker/start-engine", STAND_IN + engine)
    if fails:
        machine.put(machine.folder / "shared/docker" / fails, STAND_IN + 'echo "no space left"; exit 1\n')
    code, output = machine.run()
    made = machine.calls("image-with-compiler")
    if fails:
        assert (code, made) == (1, [])
        assert "no space left\n" in output
        assert machine.calls("nox") == []
    else:
        assert (code, made) == (0, ["image-with-compiler local/python:3.11-slim local/python:3.11-compiler"]), output
