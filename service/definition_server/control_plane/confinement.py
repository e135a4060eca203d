"""The master's part in the confinement of its workers: the master hides itself from them, and logs which protections
are missing.
"""

from __future__ import annotations

from definition_server.jail.confinement import support
from definition_server.jail.kernel import hide_process
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

_REMEDY = (
    "run it on a kernel with CONFIG_SECURITY_LANDLOCK and CONFIG_SECCOMP_FILTER whose list of security modules has "
    "landlock, in a container whose seccomp profile allows both"
)


def confine_master(mode: str) -> bool:
    """Apply ``JAIL`` to the master: hide its memory, environment and descriptors from processes of the same user.

    Returns:
        Whether the server may start: False if ``mode`` is ``require`` and the kernel lacks a feature.
    """
    if mode == "off":
        return True
    hide_process()
    offered = support()
    if not offered.missing:
        return True
    if mode == "require":
        log.critical(
            "Cannot start",
            error=f"JAIL is require, and this kernel or container offers no {offered.missing}",
            remedy=f"{_REMEDY}; or set JAIL to auto",
        )
        return False
    log.warning(
        "Workers are confined only in part" if offered.extent != "none" else "Workers are not confined",
        missing=offered.missing,
        jail=offered.extent,
        remedy=_REMEDY,
    )
    return True
