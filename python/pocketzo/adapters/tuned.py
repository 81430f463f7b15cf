"""A bundle with its weights as a run left them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec, looks_added
from pocketzo.formats.bundle import Bundle


@dataclass(frozen=True)
class Tuned:
    """A bundle, and its tensors after training.

    Attributes
    ----------
    bundle : Bundle
    tensors : mapping of str to ndarray
        All of the bundle's; often views of its files.
    """

    bundle: Bundle
    tensors: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, bundle: Bundle, trained: Mapping[str, NDArray[Any]] | None = None) -> Tuned:
        """Return a bundle with what was trained in the place of what its file has."""
        tensors = bundle.map_tensors()
        return cls(bundle, tensors | {name: value for name, value in (trained or {}).items() if name in tensors})

    @property
    def added(self) -> tuple[AddedSpec, ...]:
        """What sets added to the model.

        Raises
        ------
        BundleError
            That is nothing, or the bundle does not describe it.
        """
        bundle = self.bundle
        if bundle.added:
            return bundle.added
        name = looks_added(tensor.name for tensor in bundle.tensors)
        if name is None:
            sets = ", ".join(map(repr, bundle.trainable))
            raise BundleError(
                f"{bundle.path}: no set added tensors to this model, only its own weights were trained ({sets}): "
                "'pocketzo replay' writes the tuned bundle"
            )
        again = f"prepare the export again with --train {'+'.join(bundle.trainable)}"
        raise BundleError(
            f"{bundle.path}: does not say where {name!r} was added, as an older PocketZO prepared it: {again}, which "
            "gives the same weights, and name that bundle by --base"
        )

    @property
    def own(self) -> list[str]:
        """The names of the model's own tensors that a set trains."""
        added = {name for item in self.bundle.added for name in item.tensors}
        return [tensor.name for tensor in self.bundle.tensors if tensor.trainable and tensor.name not in added]

    def float32(self, name: str) -> NDArray[np.float32]:
        """Return a tensor as float32."""
        return np.asarray(self.tensors[name], np.float32)
