"""The system calls that a worker may make once it is confined. All others fail with EPERM.

A worker serves connections of an existing socket from existing memory. So it may use its memory, its threads, its
clocks and existing descriptors. It may not open files, make sockets or processes, or access the memory, signals or
priority of other processes.
"""

from __future__ import annotations

import errno

from definition_server.jail.kernel import X86_64, Architecture
from definition_server.jail.seccomp import ALWAYS, Comparison, Rule, refuse

_MSG_FASTOPEN = 0x20000000
_AT_EMPTY_PATH = 0x1000
_CLONE_THREAD = 0x10000
_AF_UNIX = 1
_SHUT_WR = 1
_O_CLOEXEC = 0x80000

_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC, _F_GET_SEALS = 0, 1, 2, 3, 4, 1030, 1034
_FIONREAD, _FIONBIO, _FIOCLEX, _FIONCLEX, _TCGETS, _TIOCGWINSZ, _TCGETS2 = (
    0x541B, 0x5421, 0x5451, 0x5450, 0x5401, 0x5413, 0x802C542A,
)  # fmt: skip
_PRCTL_OPTIONS = (3, 15, 16, 38, 0x53564D41)
"""PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_VMA."""

_IPPROTO_TCP, _TCP_NODELAY = 6, 1
"""The level and name of the only socket option that may be set. Connections inherit the options of the listening
socket, which all workers share: another option, such as a buffer of hundreds of octets, or a SO_LINGER or
TCP_USER_TIMEOUT that resets connections, would affect all workers."""

NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # Name: numbers on x86-64 and aarch64. Frequent calls are first, because the filter compares in this order.
    "sendto": (44, 206), "recvfrom": (45, 207), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "read": (0, 63),
    "write": (1, 64), "writev": (20, 66), "sendmsg": (46, 211), "recvmsg": (47, 212), "futex": (202, 98),
    "epoll_ctl": (233, 21), "accept4": (288, 242), "close": (3, 57), "clock_gettime": (228, 113),
    # Memory
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233),
    "brk": (12, 214), "msync": (26, 227), "membarrier": (324, 283),
    # Descriptors
    "readv": (19, 65), "pread64": (17, 67), "pwrite64": (18, 68), "lseek": (8, 62), "fstat": (5, 80),
    "newfstatat": (262, 79), "statx": (332, 291), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "fcntl": (72, 25), "ioctl": (16, 29), "pipe2": (293, 59), "eventfd2": (290, 19), "signalfd4": (289, 74),
    "timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87),
    "open": (2, None), "openat": (257, 56),
    # Waiting
    "epoll_create1": (291, 20), "epoll_pwait2": (441, 441), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "pause": (34, None), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "restart_syscall": (219, 128),
    # Existing sockets
    "accept": (43, 202), "sendmmsg": (307, 269), "recvmmsg": (299, 243), "getsockopt": (55, 209),
    "setsockopt": (54, 208), "getsockname": (51, 204), "getpeername": (52, 205), "shutdown": (48, 210),
    "socketpair": (53, 199),
    # New sockets, if the transport opens the port itself
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    # Threads
    "clone": (56, 220), "clone3": (435, 435), "exit": (60, 93), "exit_group": (231, 94),
    "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293), "set_tid_address": (218, 96),
    "gettid": (186, 178), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126),
    "futex_waitv": (449, 449), "arch_prctl": (158, None), "prctl": (157, 167), "seccomp": (317, 277),
    # Signals
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137), "rt_sigpending": (127, 136), "sigaltstack": (131, 132), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "setitimer": (38, 103), "getitimer": (36, 102),
    # Information
    "getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "getcwd": (79, 17),
    "getpriority": (140, 141), "getrlimit": (97, 163), "prlimit64": (302, 261), "getrusage": (98, 165),
    "sysinfo": (99, 179), "uname": (63, 160), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "clock_getres": (229, 114), "getrandom": (318, 278),
}  # fmt: skip
"""Every system call that a worker may make, some only with certain arguments (`rules`)."""

OPENING_A_PORT = ("socket", "connect", "bind", "listen")
"""The calls that are refused from the start to a worker that uses the master's socket, and to other workers once their
port is open."""
OPENING_A_FILE = ("open", "openat")


def number(architecture: Architecture, name: str) -> int | None:
    """The number of a system call; None if the architecture does not have the call."""
    return NUMBERS[name][0 if architecture is X86_64 else 1]


def rules(
    architecture: Architecture, pid: int, *, reads_files: bool, opens_port: bool, stacks: bool = False
) -> dict[int, Rule]:
    """Call number → rule, for process ``pid``.

    Args:
        architecture: The architecture whose call numbers are used.
        pid: The process itself, the only process that it may signal.
        reads_files: Files may be opened for reading, as far as Landlock permits.
        opens_port: Sockets may be made, bound and connected, as far as Landlock permits.
        stacks: A further filter may be installed (`refused_once_started`).
    """
    restricted = _restricted(pid)
    if not reads_files:
        restricted |= {name: Rule(refuse(errno.EPERM)) for name in OPENING_A_FILE}
    if not stacks:
        restricted |= {"seccomp": Rule(refuse(errno.EPERM))}
    if opens_port:
        # C-core sets more options on the sockets that it makes, and shuts them down in both directions.
        restricted |= {"setsockopt": Rule(), "shutdown": Rule()}
    else:
        restricted |= {name: Rule(refuse(errno.EPERM)) for name in OPENING_A_PORT}
    return {
        found: restricted.get(name, Rule()) for name in NUMBERS if (found := number(architecture, name)) is not None
    }


def refused_once_started(architecture: Architecture, *, files: bool) -> dict[int, Rule]:
    """Call number → rule of the second filter, for a worker whose start needed more calls. This filter refuses new
    sockets, further filters and, with ``files``, opening files."""
    names = (*OPENING_A_PORT, "seccomp", *(OPENING_A_FILE if files else ()))
    return {found: Rule(refuse(errno.EPERM)) for name in names if (found := number(architecture, name)) is not None}


def _restricted(pid: int) -> dict[str, Rule]:
    """The calls that are allowed only with certain arguments."""
    no_address = (Comparison(4, 0), Comparison(4, 0, high=True))
    empty_path = Comparison(3, _AT_EMPTY_PATH, mask=_AT_EMPTY_PATH)
    own = Rule(when=((Comparison(0, pid),),))
    return {
        # An address and "fast open" are refused, because either would make a connection without connect(2).
        "sendto": Rule(when=((Comparison(3, 0, mask=_MSG_FASTOPEN), *no_address),)),
        "sendmsg": Rule(when=((Comparison(2, 0, mask=_MSG_FASTOPEN),),)),
        "sendmmsg": Rule(when=((Comparison(3, 0, mask=_MSG_FASTOPEN),),)),
        "socketpair": Rule(when=((Comparison(0, _AF_UNIX),),)),
        # Shutting down the reading direction is refused: it would end a listening socket for all processes that share
        # it.
        "shutdown": Rule(when=((Comparison(1, _SHUT_WR),),)),
        "setsockopt": Rule(when=((Comparison(1, _IPPROTO_TCP), Comparison(2, _TCP_NODELAY)),)),
        "fcntl": Rule(
            when=tuple(
                (Comparison(1, command),)
                for command in (
                    _F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC, _F_GET_SEALS,
                )
            )
        ),
        "ioctl": Rule(
            when=tuple(
                (Comparison(1, request),)
                for request in (_FIONREAD, _FIONBIO, _FIOCLEX, _FIONCLEX, _TCGETS, _TIOCGWINSZ, _TCGETS2)
            )
        ),
        # Only the status of a descriptor is allowed, not of a path.
        "newfstatat": Rule(when=((empty_path,),)),
        "statx": Rule(when=((Comparison(2, _AT_EMPTY_PATH, mask=_AT_EMPTY_PATH),),)),
        "open": Rule(when=((Comparison(1, 0, mask=0xFFFFFFFF & ~_O_CLOEXEC),),)),
        "openat": Rule(when=((Comparison(2, 0, mask=0xFFFFFFFF & ~_O_CLOEXEC),),)),
        # New threads are allowed, new processes are not. The filter cannot read clone3's arguments, so clone3 is
        # refused, and the C library uses clone.
        "clone": Rule(when=((Comparison(0, _CLONE_THREAD, mask=_CLONE_THREAD),),)),
        "clone3": Rule(refuse(errno.ENOSYS), when=ALWAYS),
        "kill": own,
        "tkill": own,
        "tgkill": own,
        "prctl": Rule(when=tuple((Comparison(0, option),) for option in _PRCTL_OPTIONS)),
        "prlimit64": Rule(when=((Comparison(0, 0),),)),
    }  # fmt: skip
