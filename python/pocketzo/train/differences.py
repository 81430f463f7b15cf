"""How a trainer or a session differs from those of a saved run."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict

from pocketzo.machine import cores
from pocketzo.optim.optimizer import Optimizer
from pocketzo.runtime.model import Model
from pocketzo.train.recipe import Loop
from pocketzo.train.run import Run


def differences(past: Run, optimizer: Optimizer, loop: Loop) -> list[str]:
    """Return the settings in which a saved run and a new one differ; to resume is to use those of the saved one.

    The data and the base bundle are not compared, as :meth:`pocketzo.Trainer.resume` checks them. Threads and
    prepacking are not compared either.
    """
    method = json.loads(json.dumps(optimizer.settings()))  # as the journal has it: lists, no tuples
    absent = {"share": None, "exact": False, "pace": None, "candidates": None}
    there = {**absent, **past.recipe.method, **asdict(past.recipe.loop)}
    here = {**absent, **method, **asdict(loop)}
    implied = set()
    if there["steps"] != here["steps"]:
        implied |= {"schedule", "eval_every"}
    if there["method"] != here["method"]:
        implied |= {"distribution", "queries", "momentum", "rank", "interval"}
    if there["share"] != here["share"]:
        implied |= {"exact"}
    return [
        f"other weights are trained ({len(there[name])} there, {len(here[name])} here)"
        if name == "trained"
        else f"{name} is {there[name]} there and {here[name]} here"
        for name in here
        if name not in implied and there[name] != here[name]
    ]


def warn_of_another_session(model: Model, past: Run) -> None:
    """Warn if a model's session rounds losses unlike that of a saved run, or is slow with its threads."""
    session = past.recipe.session
    usable = len(cores.usable())
    if model.threads > usable:
        warnings.warn(
            f"{past.path}: goes on with the {model.threads} threads of its journal, on which the roundings of losses "
            f"may depend, though that is slow with fewer cores to use ({usable})",
            stacklevel=3,
        )
    if model.prepacked != session.prepacked:
        became = "prepacked" if model.prepacked else f"not prepacked ({model.not_prepacked_because})"
        warnings.warn(
            f"{past.path}: goes on with weights that are {became}, unlike its journal: losses round otherwise, so that "
            f"the run ends near where it would have ended, but not at the same bits",
            stacklevel=3,
        )
