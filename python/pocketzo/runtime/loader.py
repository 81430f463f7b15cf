"""Loading a bundle as a model: prepacked where possible, else plain."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnxruntime as ort

from pocketzo._core import has_fp16_arithmetic
from pocketzo.errors import Error, MemoryLimitError, NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.machine.memory import resident_memory
from pocketzo.runtime.image import Image
from pocketzo.runtime.liveness import Verify, check_plain, check_prepacked, noise_outputs
from pocketzo.runtime.matrices import Matrix
from pocketzo.runtime.model import SMALL, Model, megabytes
from pocketzo.runtime.noise import read_as_noise
from pocketzo.runtime.prepack import open_session, plan_prepacking
from pocketzo.runtime.session import open_plain
from pocketzo.runtime.weights import Weights


@dataclass(frozen=True)
class Loader:
    """All settings of :func:`pocketzo.load`, checked, and with the number of threads that was chosen.

    Attributes
    ----------
    bundle : Bundle
    threads : int
    prepack : bool or "auto"
    verify : {"auto", "fast", "full"}
    max_memory : int or None
    forward_seconds : mapping of int to float
        See :class:`Model`.
    """

    bundle: Bundle
    threads: int
    prepack: bool | Literal["auto"]
    verify: Verify
    max_memory: int | None
    forward_seconds: Mapping[int, float]

    def load(self) -> Model:
        """Load the bundle. Warnings are attributed to the caller of :func:`pocketzo.load`."""
        model, idle = self._load()
        if idle:
            names = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
            warnings.warn(
                f"{self.bundle.path}: nothing that was tried changes with {names}: is it unused, or used only with "
                f"other inputs? Whether the session sees what is written there could not be checked",
                stacklevel=3,
            )
        return model

    def _load(self) -> tuple[Model, tuple[str, ...]]:
        reason = "as asked for"
        if self.prepack:
            try:
                return self._load_prepacked()
            except (NotPrepackableError, MemoryError, OSError) as error:  # the plain layout may need less
                reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
                if self.prepack is True:
                    raise Error(f"{self.bundle.path}: the weights cannot be prepacked: {reason}") from None
        model, idle = self._load_plain(reason)
        if self.bundle.is_fp16:
            if not has_fp16_arithmetic():
                warnings.warn(
                    "this processor does not compute in fp16: onnxruntime converts each weight at every use, which is "
                    "slow",
                    stacklevel=4,
                )
        elif self.prepack:
            warnings.warn(f"weights are not prepacked, which is slower: {reason}", stacklevel=4)
        return model, idle

    def _load_plain(self, reason: str) -> tuple[Model, tuple[str, ...]]:
        weights = Weights(self.bundle)
        read_as_noise(weights, self.bundle)  # constants must be there when the session folds them
        model = self._model(weights, open_plain(self.bundle, weights.image.values, self.threads), reason)
        return model, check_plain(model, self.verify)

    def _load_prepacked(self) -> tuple[Model, tuple[str, ...]]:
        plan = plan_prepacking(self.bundle)
        if self.max_memory is not None:
            try:
                check_room(self.bundle, self.max_memory, plan.matrices)
            except MemoryLimitError as error:
                raise NotPrepackableError(str(error)) from None
        batches, expected = noise_outputs(self.bundle)  # freed before there is prepacked memory: never two copies
        image = Image.allocate(self.bundle, without=plan.only_prepacked)
        session, locations = open_session(plan, image.values, self.threads)
        weights = Weights(self.bundle, image, locations)
        read_as_noise(weights, self.bundle)
        model = self._model(weights, session, None)
        return model, check_prepacked(model, batches, expected, self.verify)

    def _model(self, weights: Weights, session: ort.InferenceSession, reason: str | None) -> Model:
        return Model(
            self.bundle,
            weights,
            session,
            threads=self.threads,
            max_memory=self.max_memory,
            forward_seconds=self.forward_seconds,
            not_prepacked_because=reason,
        )


def check_room(bundle: Bundle, most: int, matrices: Sequence[Matrix] = ()) -> None:
    """Check that loading a bundle, and prepacking some of its weights, would not take more than ``most`` bytes.

    Raises
    ------
    MemoryLimitError
        It would, with figures.
    """
    resident = resident_memory()
    weights = bundle.weights_path.stat().st_size
    weights += sum(matrix.nbytes for matrix in matrices if matrix.shared)
    room = weights // 16 + SMALL  # sessions and checks took 15 to 54 MB with 23 M to 355 M parameters
    room += max((3 * matrix.nbytes for matrix in matrices), default=0)  # as onnxruntime packs one
    if resident + weights + room > most:
        raise MemoryLimitError(
            f"{bundle.path}: loading takes {megabytes(resident + weights + room)} ({megabytes(weights)} of weights, "
            f"{megabytes(room)} to work with, {megabytes(resident)} in use already), and the limit is {megabytes(most)}"
        )
