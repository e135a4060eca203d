"""The checker process: judges rows that the master sends it over a socket, under limits and in the jail.

It is a fresh interpreter without the environment (``-I -S``); its socket is its only descriptor. The process is not
trusted, because the sources that it compiles may be hostile. A source that exceeds a limit ends the process, and the
master starts another.

Protocol: the master sends rows, each as `HEADER` (the checks, and the lengths of name, interface and code) and the
octets. The answer to each is one octet, sent before the next row is judged. So if the process ends, the first row
without an answer was the cause.
"""

from __future__ import annotations

import codecs
import encodings
import os
import resource
import socket
import struct
import sys
import time
import unicodedata  # noqa: F401 - compile() imports it for names that are not ASCII; in the jail no file can be opened
from contextlib import suppress

from definition_server.catalog.content_check import ANSWER, FUNCTION, INTERFACE, READY, Flaw, flaws_of
from definition_server.inherited import interpreter, leave_signals_to_the_master
from definition_server.jail.confinement import Extent, Jail, support

HEADER = struct.Struct("<BIII")

MEMORY = 512 * 1024 * 1024
"""Address space. 4 MiB of ordinary code take 230 MB; 4 MiB of one list of numbers would take 1.4 GB."""
_MIB = 1024 * 1024
_DESCRIPTORS = 16
_CODECS = ("ascii", "cp1252", "iso8859-15", "utf-8-sig")
"""Encodings that some sources declare in their first line. They are loaded while files can be opened; UTF-8 and Latin-1
need no file.
"""
CODINGS = "codings"
"""The argument of a process that loads all encodings that come with Python, which takes 50 ms more of CPU time."""
_SPARE_FRAMES = 150
"""So many frames are on the stack when a row is judged. A recursion limit counts all frames of the stack, and a client
compiles deep inside its own program: without these frames, code could compile here that does not compile in the client.
"""


def cpu_seconds(size: int) -> int:
    """The seconds of CPU time that a row of ``size`` octets may use. 4 MiB of ordinary code take 1.3 s."""
    return 2 + size // _MIB


def main(arguments: list[str]) -> int:
    """Serve the socket whose descriptor is the first argument; the second is ``JAIL``, a third may be `CODINGS`."""
    leave_signals_to_the_master()
    end = socket.socket(fileno=int(arguments[0]))
    _limit()
    for codec in _all_codecs() if CODINGS in arguments else _CODECS:
        with suppress(LookupError):  # "mbcs" and "oem" are for Windows
            codecs.lookup(codec)
    if arguments[1] != "off":
        jail = Jail(support())
        refused = jail.enter()
        if arguments[1] == "require" and (refused or jail.reached.extent is not Extent.FULL):
            return 1
    if not _works():
        return 1
    end.sendall(READY)
    _deeper(end, _SPARE_FRAMES)
    return 0


def _all_codecs() -> list[str]:
    # pathlib is not used, because it takes as long to import as half of the codecs.
    names = {each.partition(".")[0] for path in encodings.__path__ for each in os.listdir(path)}  # noqa: PTH208 - see above
    return sorted(names - {"__init__", "__pycache__", "aliases"})


def _limit() -> None:
    """Limit memory, processes and files, and make this process the first that the kernel kills if it lacks memory.
    Limits that are lower already are not changed, because only root may raise them."""
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, _DESCRIPTORS),
    ):
        _lower(limit, most)
    try:
        descriptor = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(descriptor, b"1000")
        os.close(descriptor)
    except OSError:
        pass  # not essential: it only helps the kernel to choose a process


def _lower(limit: int, most: int) -> None:
    """Set a limit to ``most``, or to its hard limit if that is lower."""
    hard = resource.getrlimit(limit)[1]
    least = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (least, least))


def _allow(size: int) -> None:
    """Limit the CPU time of the next row, of ``size`` octets, to `cpu_seconds`, or to the time that the process has
    left, if that is less.
    """
    soft, hard = int(time.process_time()) + 1 + cpu_seconds(size), resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _works() -> bool:
    """Whether this process gives the right verdicts on known samples."""
    _allow(0)
    everything = FUNCTION | INTERFACE
    good = flaws_of(everything, b"self-test", b"[]", b'# coding: utf-8\n\xc3\xb1 = "\\N{BULLET}"\nreturn 1\n')
    bad = flaws_of(everything, b"self-test", b"{", b"if")
    return good == Flaw.NONE and bad == Flaw.CODE | Flaw.INTERFACE


def _deeper(end: socket.socket, frames: int) -> None:
    if frames:
        _deeper(end, frames - 1)
    else:
        _serve(end)


def _serve(end: socket.socket) -> None:
    """Answer until the master closes its end."""
    stream = end.makefile("rb", 256 * 1024)
    while header := stream.read(HEADER.size):
        checks, *lengths = HEADER.unpack(header)
        parts = [stream.read(length) for length in lengths]
        _allow(sum(lengths))
        end.sendall(bytes((ANSWER | flaws_of(checks, *parts),)))


def command(descriptor: int, jail: str) -> list[str]:
    """The command line of a checker process that inherits ``descriptor``."""
    # The third parent is the directory that holds the package (the others are control_plane and definition_server). It
    # is the last in the path, behind the standard library.
    home = os.path.realpath(__file__).rsplit(os.sep, 3)[0]
    program = (
        "import sys; sys.path.append(sys.argv.pop(1)); "
        "from definition_server.control_plane.checker_process import main; sys.exit(main(sys.argv[1:]))"
    )
    # -I also ignores PYTHONPYCACHEPREFIX; without the bytecode in that folder a start takes three times as long.
    cache = [] if sys.pycache_prefix is None else ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    return [interpreter(), "-I", "-S", "-B", *cache, "-W", "ignore", "-c", program, home, str(descriptor), jail]
