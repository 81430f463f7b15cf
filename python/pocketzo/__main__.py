"""Entry point of ``python -m pocketzo`` and of the console script ``pocketzo``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; if a package that it needs is missing, exit with the command that installs it."""
    try:
        from pocketzo.cli import app as cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("click", "rich"):
            raise
        sys.exit(f"pocketzo: the command line needs {package}, which is not installed: pip install 'pocketzo[cli]'")
    cli.main()


if __name__ == "__main__":
    main()
