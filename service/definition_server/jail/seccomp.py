"""seccomp filters (seccomp(2)): a program for the kernel that answers each system call with "allow" or an error.

Refused calls fail with EPERM, and nothing is logged, so that a library falls back to another call or reports the error
like any other. A program is written in classic BPF (``linux/filter.h``) and reads the call's number, the architecture
and the arguments, never memory behind a pointer. If a call is allowed with any arguments, the kernel remembers this
(since 5.11), and does not run the program for it.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Mapping
from typing import NamedTuple

from definition_server.jail.kernel import PR_SET_NO_NEW_PRIVS, Architecture, call, prctl

ALLOW = 0x7FFF0000
_ERRNO = 0x00050000

_SET_MODE_FILTER, _GET_ACTION_AVAIL = 1, 2
_TSYNC, _SPEC_ALLOW = 1, 4

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_JUMP_EQUAL, _JUMP_AT_LEAST = 0x15, 0x35
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in ``struct seccomp_data``."""

_X32 = 0x40000000
"""The bit in the numbers of x32 system calls, a separate ABI."""

LAST_KNOWN = 470
"""The newest system call in these tables. A newer call fails with ENOSYS, as on a kernel without it, so that a library
that tries a new call falls back to the old one."""


def refuse(number: int) -> int:
    """The answer "fail with this errno"."""
    return _ERRNO | number


class Comparison(NamedTuple):
    """A condition on half of an argument: ``argument & mask == value``."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFF
    high: bool = False
    """Whether the upper 32 bits of the argument are compared in place of the lower ones. This is for pointers."""


Alternatives = tuple[tuple[Comparison, ...], ...]
"""A call gets the rule's answer if all comparisons of one of the alternatives hold; otherwise it fails with EPERM."""

ALWAYS: Alternatives = ((),)


class Rule(NamedTuple):
    """The answer to one system call."""

    answer: int = ALLOW
    when: Alternatives = ALWAYS


class _Instruction(ctypes.Structure):
    """``struct sock_filter``."""

    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


Instruction = tuple[int, int, int, int]
"""An instruction: code, instructions to skip if true, instructions to skip if false, operand."""


def program(architecture: Architecture, rules: Mapping[int, Rule], otherwise: int) -> list[Instruction]:
    """A filter: the rule of each call number, in order, and ``otherwise`` for every other call."""
    written: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, refuse(errno.EPERM)),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, refuse(errno.EPERM)),
    ]
    for number, rule in rules.items():
        block = _block(rule)
        written += [(_JUMP_EQUAL, 0, len(block), number), *block]
    if otherwise != ALLOW:
        written += [(_JUMP_AT_LEAST, 0, 1, LAST_KNOWN + 1), (_RETURN, 0, 0, refuse(errno.ENOSYS))]
    return [*written, (_RETURN, 0, 0, otherwise)]


def _block(rule: Rule) -> list[Instruction]:
    """The instructions that answer one call after its number has matched."""
    written: list[Instruction] = []
    for tests in rule.when:
        passed: list[Instruction] = [(_RETURN, 0, 0, rule.answer)]
        for test in reversed(tests):
            offset = _ARGUMENTS + 8 * test.argument + (4 if test.high else 0)  # both architectures: low half first
            masked = [] if test.mask == 0xFFFFFFFF else [(_AND, 0, 0, test.mask)]
            passed = [(_LOAD, 0, 0, offset), *masked, (_JUMP_EQUAL, 0, len(passed), test.value), *passed]
        written += passed
        if not tests:
            return written
    return [*written, (_RETURN, 0, 0, refuse(errno.EPERM))]


def available(architecture: Architecture) -> bool:
    """Whether the kernel supports filters, and a container's own filter allows setting them."""
    answer = ctypes.c_uint32(_ERRNO)
    try:
        call(architecture.seccomp, _GET_ACTION_AVAIL, 0, ctypes.byref(answer))
    except OSError:
        return False
    return True


def install(architecture: Architecture, instructions: list[Instruction], *, every_thread: bool = False) -> None:
    """Put the calling thread and the threads that it starts under a filter for good; with ``every_thread``, all threads
    of this process.

    Raises:
        OSError: if the kernel refuses the filter.
    """
    array = (_Instruction * len(instructions))(*(_Instruction(*each) for each in instructions))
    filter_program = _Program(len(instructions), array)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    flags = _TSYNC if every_thread else 0
    # Without the flag, kernels before 5.16 slow the whole process down (a mitigation of speculative store bypass). No
    # foreign code that could exploit this runs here.
    for each in (flags | _SPEC_ALLOW, flags):
        try:
            refused = call(architecture.seccomp, _SET_MODE_FILTER, each, ctypes.byref(filter_program))
        except OSError as error:
            if error.errno != errno.EINVAL or each == flags:
                raise
            continue
        if refused:
            raise OSError(errno.EBUSY, f"thread {refused} could not be put under the filter")
        return
