"""Commands for operators and newcomers."""

from __future__ import annotations

import sys

from definition_server.inherited import prepare

_INTERRUPTED = 130
"""`Exit.INTERRUPTED`, which is not imported yet."""


def run() -> None:
    """The command ``definition-server``. Its imports take a while: Ctrl-C meanwhile ends it without a traceback."""
    prepare()
    try:
        from definition_server.cli.main import main
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    main()
