"""Options of one method alone, shared by ``train`` and ``federate``."""

from __future__ import annotations

from typing import Any

import click

from pocketzo.optim.lozo import LOZO

rank_option = click.option(
    "--rank",
    type=int,
    metavar="R",
    help=f"Rank of the directions of lozo, at most 16.  [default: {LOZO.default_rank}]",
)
interval_option = click.option(
    "--interval",
    type=int,
    metavar="STEPS",
    help=f"Steps for which lozo keeps the factor V of its directions.  [default: {LOZO.default_interval}]",
)
_METHOD_OF = {"momentum": "momentum", "rank": "lozo", "interval": "lozo"}


def own_settings(method: str, **given: float | None) -> dict[str, Any]:
    """Return those of the settings that were given, not None; refuse one of another method by name."""
    for name, value in given.items():
        if value is not None and _METHOD_OF[name] != method:
            raise click.UsageError(f"--{name} is of --method {_METHOD_OF[name]}, not of {method}")
    return {name: value for name, value in given.items() if value is not None}
