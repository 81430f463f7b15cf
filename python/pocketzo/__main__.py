"""Entry point of ``python -m pocketzo`` and of the console script ``pocketzo``."""

from __future__ import annotations

import sys

from pocketzo.packages import EXTRAS, core_problem, problem, report


def main() -> None:
    """Run the command line; if a package that it needs is missing or broken, exit with the reason and the remedy.

    ``doctor`` then describes the packages alone.
    """
    errors = [core_problem(), *map(problem, EXTRAS["cli"])]
    error = next((error for error in errors if error is not None), None)
    if error is None:
        from pocketzo.cli import app as cli

        cli.main()
        return
    if "doctor" in sys.argv[1:2]:
        print(report("--json" in sys.argv))
    sys.exit(f"pocketzo: error: {error}")


if __name__ == "__main__":
    main()
