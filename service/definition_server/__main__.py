"""``python -m definition_server``."""

from definition_server.cli.main import main

if __name__ == "__main__":
    main()
