"""Registries of the methods and of the subsets, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketzo.errors import joined_lines
from pocketzo.optim.block import Block
from pocketzo.optim.fzoo import FZOO
from pocketzo.optim.groups import ParamGroup, Tunable
from pocketzo.optim.lozo import LOZO
from pocketzo.optim.mezo import MeZO
from pocketzo.optim.momentum import Momentum
from pocketzo.optim.optimizer import Optimizer, Subset
from pocketzo.optim.pace import Pace
from pocketzo.optim.schedule import Schedule
from pocketzo.optim.sign import Sign

METHODS: Mapping[str, type[Optimizer]] = {
    "fzoo": FZOO,
    "lozo": LOZO,
    "mezo": MeZO,
    "momentum": Momentum,
    "sign": Sign,
}
SUBSETS: Mapping[str, type[Subset]] = {
    "block": Block,
}


def from_settings(
    model: Tunable, settings: Mapping[str, Any], methods: Mapping[str, type[Optimizer]] = METHODS
) -> Optimizer:
    """Make the optimizer with the given :meth:`Optimizer.settings`.

    Parameters
    ----------
    model : Tunable
        Its weights are those that the original optimizer began with, or a copy of them.
    settings : mapping
        As returned by :meth:`Optimizer.settings`, also after a round trip through JSON.
    methods : mapping of str to type
        The optimizers by name.

    Raises
    ------
    ValueError
        The method or the subset is unknown, or a setting is not one of its own.
    """
    arguments = dict(settings)
    try:
        method = methods[arguments.pop("method")]
        trained = frozenset(arguments.pop("trained"))
        subset = arguments.pop("subset")
        if subset is not None:
            arguments["subset"] = SUBSETS[subset["name"]](**{k: v for k, v in subset.items() if k != "name"})
        arguments["groups"] = [ParamGroup(**group) for group in arguments["groups"]]
        arguments.setdefault("exact", False)
        if "pace" in arguments:
            arguments["pace"] = Pace(**arguments["pace"])
        arguments["schedule"] = Schedule(**arguments["schedule"])
        known = {tensor.name for tensor in model.bundle.tensors if tensor.trainable}
        if missing := sorted(trained - known):
            raise ValueError(f"the bundle has no trainable weight {missing[0]!r}, which the optimizer trains")
        return method(model, trainable=trained.__contains__, **arguments)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the settings of an optimizer: {type(error).__name__}: {joined_lines(error)}") from None
