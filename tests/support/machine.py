"""Facts about the machine of a measurement, which are needed to interpret its figures."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("grpcio", "protobuf", "uvloop", "hpack", "hdrhistogram")
PROGRAMS = {
    "h2load": "--version",
    "nghttpd": "--version",
    "nginx": "-v",
    "ghz": "--version",
    "node": "--version",
    "go": "version",
}
ROOT = Path(__file__).parents[2]
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


class TooFewCpus(Exception):
    """Server and generator cannot have a CPU each."""


def facts() -> dict[str, Any]:
    """Facts about the machine before the measurement; `after` returns the facts that may have changed."""
    return {
        "cpu": cpu(), "cpus": os.cpu_count(), "kernel": platform.release(),
        "python": platform.python_version(), "python_build": python_build(),
        "governor": governor(), "memory_mb": memory_mb(),
        "load_before": list(os.getloadavg()), "steal_ticks_before": steal_ticks(),
    }  # fmt: skip


def after() -> dict[str, Any]:
    """Facts about the machine after the measurement."""
    return {"load_after": list(os.getloadavg()), "steal_ticks_after": steal_ticks()}


def need_cpus(cpus: int | None = None) -> None:
    """Make sure that server and generator can have a CPU each.

    Raises:
        TooFewCpus: if they cannot.
    """
    found = len(os.sched_getaffinity(0)) if cpus is None else cpus
    if found < 2:
        raise TooFewCpus(
            f"this process may use {found} CPU: server and generator would share it, and every figure would be about "
            "both. At least 2 CPUs are needed (check taskset and cgroups, or use a larger machine)."
        )


def memory_mb() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def cpu() -> str:
    """The name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    numbers = f"family {told.get('cpu family', '?')}, model {told.get('model', '?')}"
    return f"{told.get('model name', platform.machine())} ({numbers})"


def python_build() -> str:
    """How the interpreter was built, as far as the interpreter shows it. The CPU time of bytecode depends on the build.

    Debian's Python is built with profile-guided optimization (PGO), which its configuration does not show.
    """
    if "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS")):
        return "with PGO"
    ours = Path(sys.executable).resolve().is_relative_to("/usr/bin")
    return "the distribution's build" if ours else "not configured with --enable-optimizations"


def governor() -> str:
    """The governor that sets the clock rate; a virtual machine cannot read it."""
    try:
        return _GOVERNOR.read_text().strip()
    except OSError:
        return "not told"


def steal_ticks() -> int:
    """Ticks that the hypervisor gave to other machines; a run with many such ticks is disturbed."""
    return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])


def versions() -> dict[str, str]:
    """Versions of the packages and programs that take part."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    for program, option in PROGRAMS.items():
        try:
            run = subprocess.run([program, option], capture_output=True, text=True, timeout=10, check=False)
            found[program] = (run.stdout or run.stderr).strip().split("\n")[0]
        except (OSError, subprocess.TimeoutExpired):
            found[program] = "not installed"
    return found


def commit() -> str:
    """The revision of the working tree, with ``+`` if it has changes; empty outside a repository."""
    try:
        told = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except OSError:
        return ""
    return told.stdout.strip()


def label() -> str:
    """A name for the kind of machine, usable in a file name, such as ``epyc-2cpu``; not the host name."""
    words = re.findall(r"[a-z0-9]+", cpu().lower())
    kind = next((word for word in words if word in _FAMILIES), platform.machine().replace("_", "-"))
    return f"{kind}-{os.cpu_count()}cpu"


_FAMILIES = ("epyc", "ryzen", "xeon", "core", "graviton", "neoverse", "ampere", "apple")
