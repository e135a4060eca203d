"""The filter of a worker, run by an interpreter of classic BPF, for both architectures; and its tables."""

from __future__ import annotations

import errno
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from definition_server.jail import calls, landlock, seccomp
from definition_server.jail.kernel import AARCH64, X86_64, Architecture, architecture

PID = 4711
NOBODY = 65534
EPERM, ENOSYS = seccomp.refuse(errno.EPERM), seccomp.refuse(errno.ENOSYS)
ARCHITECTURES = pytest.mark.parametrize("machine", [X86_64, AARCH64], ids=["x86_64", "aarch64"])
HEADERS = {X86_64: "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", AARCH64: "/usr/include/asm-generic/unistd.h"}


def run(written: list[seccomp.Instruction], number: int, arguments: tuple[int, ...], audit: int) -> int:
    """The answer that the kernel would give (``net/core/filter.c``, as far as these programs use it)."""
    padded = [each & (2**64 - 1) for each in (*arguments, *[0] * 6)][:6]
    data = struct.pack("<IIQ6Q", number, audit, 0, *padded)
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, operand = written[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, operand)
            case 0x54:
                accumulator &= operand
            case 0x15:
                at += if_true if accumulator == operand else if_false
            case 0x35:
                at += if_true if accumulator >= operand else if_false
            case 0x06:
                return operand
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


def answer(
    machine: Architecture,
    name: str,
    *arguments: int,
    reads_files: bool = False,
    opens_port: bool = False,
    stacks: bool = False,
) -> int:
    rules = calls.rules(machine, PID, reads_files=reads_files, opens_port=opens_port, stacks=stacks)
    number = calls.number(machine, name)
    assert number is not None
    return run(seccomp.program(machine, rules, EPERM), number, arguments, machine.audit)


ALLOWED = [
    ("read", ()), ("write", ()), ("epoll_pwait", ()), ("accept4", ()), ("futex", ()), ("mmap", ()),
    ("sendto", (7, 1, 100, 0x4000, 0, 0)), ("sendmsg", (7, 1, 0x4000)), ("socketpair", (1, 1, 0)),
    ("shutdown", (7, 1)), ("setsockopt", (7, 6, 1)), ("fcntl", (7, 4)), ("fcntl", (7, 1034)),
    ("ioctl", (7, 0x541B)), ("newfstatat", (7, 1, 1, 0x1000)), ("clone", (0x3D0F00,)), ("kill", (PID, 15)),
    ("tgkill", (PID, PID + 1, 6)), ("prctl", (15,)), ("prlimit64", (0,)),
]  # fmt: skip
REFUSED = [
    ("sendto", (7, 1, 9, 0x20000000, 0, 0)), ("sendto", (7, 1, 9, 0, 0x1000, 16)), ("sendto", (7, 1, 9, 0, 1 << 40)),
    ("sendmsg", (7, 1, 0x20000000)), ("socketpair", (2, 1, 0)), ("shutdown", (7, 0)), ("shutdown", (7, 2)),
    ("setsockopt", (7, 1, 26)), ("setsockopt", (7, 1, 50)), ("setsockopt", (7, 6, 31)), ("setsockopt", (7, 0, 8)),
    ("setsockopt", (7, 1, 8)), ("setsockopt", (7, 1, 13)), ("setsockopt", (7, 1, 20)), ("setsockopt", (7, 6, 18)),
    ("fcntl", (7, 8)), ("fcntl", (7, 10)), ("fcntl", (7, 1033)), ("ioctl", (0, 0x5412)), ("newfstatat", (7, 1, 1, 0)),
    ("clone", (17,)), ("clone", (0x10000000,)), ("kill", (PID - 1, 0)), ("kill", (0, 1)), ("kill", (-1, 1)),
    ("tgkill", (PID - 1, PID - 1, 9)), ("tkill", (PID - 1, 9)), ("prctl", (4, 1)), ("prctl", (22, 2)),
    ("prlimit64", (PID - 1,)), ("openat", (-100, 1, 0)), ("socket", (2, 1)), ("connect", (7,)), ("bind", (7,)),
    ("listen", (7,)), ("seccomp", (1,)),
]  # fmt: skip


@ARCHITECTURES
@pytest.mark.parametrize(("name", "arguments"), ALLOWED)
def test_a_call_that_serving_needs_is_allowed(machine: Architecture, name: str, arguments: tuple[int, ...]) -> None:
    assert answer(machine, name, *arguments) == seccomp.ALLOW


@ARCHITECTURES
@pytest.mark.parametrize(("name", "arguments"), REFUSED)
def test_a_call_that_reaches_outside_is_refused(machine: Architecture, name: str, arguments: tuple[int, ...]) -> None:
    assert answer(machine, name, *arguments) == EPERM


@ARCHITECTURES
@pytest.mark.parametrize("flags", [0, 0x80000])
def test_files_may_be_opened_only_for_reading_and_only_if_that_is_permitted(machine: Architecture, flags: int) -> None:
    assert answer(machine, "openat", -100, 1, flags, reads_files=True) == seccomp.ALLOW
    for more in (0o1, 0o2, 0o100, 0o1000, 0o2000, 0o10000000):  # WRONLY, RDWR, CREAT, TRUNC, APPEND, PATH
        assert answer(machine, "openat", -100, 1, flags | more, reads_files=True) == EPERM


@ARCHITECTURES
def test_a_call_that_is_not_listed_fails_and_one_newer_than_the_list_does_not_exist(machine: Architecture) -> None:
    written = seccomp.program(machine, calls.rules(machine, PID, reads_files=True, opens_port=True), EPERM)
    listed = set(calls.rules(machine, PID, reads_files=True, opens_port=True))
    for number in set(range(seccomp.LAST_KNOWN + 1)) - listed:
        assert run(written, number, (), machine.audit) == EPERM, number
    assert run(written, seccomp.LAST_KNOWN + 1, (), machine.audit) == ENOSYS


@ARCHITECTURES
def test_clone3_does_not_exist_so_that_the_c_library_uses_clone(machine: Architecture) -> None:
    assert answer(machine, "clone3") == ENOSYS


@ARCHITECTURES
def test_calls_of_another_architecture_and_of_x32_are_refused(machine: Architecture) -> None:
    written = seccomp.program(machine, calls.rules(machine, PID, reads_files=True, opens_port=True), EPERM)
    number = calls.number(machine, "read")
    assert number is not None
    assert run(written, number, (), 0x40000003) == EPERM  # AUDIT_ARCH_I386
    assert run(written, number | 0x40000000, (), machine.audit) == EPERM


@ARCHITECTURES
def test_a_second_filter_can_be_installed_only_if_it_is_planned(machine: Architecture) -> None:
    assert answer(machine, "seccomp", 1, stacks=True) == seccomp.ALLOW
    assert answer(machine, "seccomp", 1, reads_files=True, opens_port=True) == EPERM


@ARCHITECTURES
@pytest.mark.parametrize("files", [False, True])
def test_once_the_port_is_open_no_socket_is_made_and_no_file_is_opened(machine: Architecture, files: bool) -> None:
    written = seccomp.program(machine, calls.refused_once_started(machine, files=files), seccomp.ALLOW)
    refused = (*calls.OPENING_A_PORT, "seccomp", *(calls.OPENING_A_FILE if files else ()))
    for name in calls.NUMBERS:
        number = calls.number(machine, name)
        if number is not None:
            expected = EPERM if name in refused else seccomp.ALLOW
            assert run(written, number, (), machine.audit) == expected


@ARCHITECTURES
def test_the_numbers_are_those_of_the_kernels_headers(machine: Architecture) -> None:
    path = Path(HEADERS[machine])
    if not path.exists():
        pytest.skip("no headers of the kernel on this machine")
    found = re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)$", path.read_text(), re.MULTILINE)
    known = {name: int(number) for name, number in found}
    if machine is AARCH64:  # the generic list has these names only in macros
        known |= {"newfstatat": 79, "fstat": 80, "fcntl": 25, "lseek": 62, "mmap": 222}
    assert {name: calls.number(machine, name) for name in calls.NUMBERS if name in known} == {
        name: known[name] for name in calls.NUMBERS if name in known
    }
    assert {name for name in calls.NUMBERS if calls.number(machine, name) is not None} <= known.keys()


@ARCHITECTURES
def test_the_program_fits_into_the_kernels_limit(machine: Architecture) -> None:
    written = seccomp.program(machine, calls.rules(machine, PID, reads_files=True, opens_port=False), EPERM)
    assert len(written) < 4096  # BPF_MAXINSNS
    assert all(0 <= jump < 256 for _, if_true, if_false, _ in written for jump in (if_true, if_false))


@pytest.mark.parametrize(
    ("abi", "files", "net", "scopes"),
    [(1, 13, 0, 0), (2, 14, 0, 0), (3, 15, 0, 0), (4, 15, 2, 0), (5, 16, 2, 0), (6, 16, 2, 2), (9, 16, 2, 2)],
)
def test_the_ruleset_for_each_abi_of_landlock_refuses_all_that_the_abi_can_refuse(
    abi: int, files: int, net: int, scopes: int
) -> None:
    assert [bits.bit_count() for bits in landlock.refused_by(abi)] == [files, net, scopes]


@pytest.mark.skipif(landlock.abi_version() == 0 or architecture() is None, reason="the kernel has no Landlock")
@pytest.mark.parametrize("abi", range(1, landlock.abi_version() + 1))
def test_the_kernel_takes_the_ruleset_of_every_abi_up_to_its_own(abi: int) -> None:
    program = (
        "import os\n"
        "from definition_server.jail import landlock\n"
        f"landlock.restrict({abi}, bind_ports=(1,), readable=('/dev/null',))\n"
        "open('/dev/null').close()\n"
        "try: open('/etc/passwd')\n"
        "except PermissionError: print('refused')\n"
    )
    # A confined process cannot write its coverage when it ends.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr) == ("refused\n", "")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start processes of another account")
def test_a_hidden_process_cannot_be_read_by_its_own_user() -> None:
    account: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    # The account cannot run this interpreter, so the process changes to it. That also hides the process, which is
    # undone.
    become = (
        "import os\n"
        "from definition_server.jail.kernel import PR_SET_DUMPABLE, hide_process, prctl\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "prctl(PR_SET_DUMPABLE, 1)\n"
    )
    wait = "print(flush=True); input()"
    pipe = subprocess.PIPE
    for program, readable in ((become + wait, True), (f"{become}hide_process()\n{wait}", False)):
        with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == b"\n"
                for file in ("environ", "mem", "maps"):
                    reading = ["head", "-c", "0", f"/proc/{process.pid}/{file}"]
                    done = subprocess.run(reading, capture_output=True, check=False, cwd="/", **account)
                    assert (done.returncode == 0) is readable, done.stderr
            finally:
                process.kill()
