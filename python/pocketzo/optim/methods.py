"""The methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketzo.optim.fzoo import FZOO
from pocketzo.optim.groups import Group, Tunable
from pocketzo.optim.mezo import MeZO
from pocketzo.optim.optimizer import Optimizer
from pocketzo.optim.schedule import Schedule

METHODS: Mapping[str, type[Optimizer]] = {cls.method: cls for cls in (MeZO, FZOO)}


def restore(model: Tunable, settings: Mapping[str, Any]) -> Optimizer:
    """Make the optimizer whose :meth:`Optimizer.settings` were recorded."""
    arguments = dict(settings)
    trained = set(arguments.pop("trained"))
    arguments["groups"] = [Group(**group) for group in arguments["groups"]]
    arguments["schedule"] = Schedule(**arguments["schedule"])
    return METHODS[arguments.pop("method")](model, trainable=trained.__contains__, **arguments)
