"""``python -m definition_server``."""

from __future__ import annotations

if __name__ == "__main__":
    from definition_server.inherited import prepare

    prepare()  # before the imports of the command line, which take a while
    from definition_server.cli.main import main

    main()
