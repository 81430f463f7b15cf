"""Loading a bundle as a model: prepacked where possible, else plain."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pocketzo._core import has_fp16_arithmetic
from pocketzo.errors import (
    DeadWeightError,
    Error,
    MemoryLimitError,
    NothingToPrepackError,
    NotPrepackableError,
    first_line,
)
from pocketzo.formats.bundle import Bundle
from pocketzo.machine.memory import megabytes, resident_memory
from pocketzo.runtime.cut import Cut
from pocketzo.runtime.frozen import frozen_base, model_over_base, trained_weights
from pocketzo.runtime.halves import Halves
from pocketzo.runtime.image import Image
from pocketzo.runtime.liveness import Verify, check_groups, check_plain, check_prepacked, noise_outputs
from pocketzo.runtime.matrices import Matrix
from pocketzo.runtime.model import SMALL, Model
from pocketzo.runtime.noise import read_as_noise, trainable, write_noise
from pocketzo.runtime.outputs import unoptimised_outputs
from pocketzo.runtime.prepack import open_session, plan_prepacking
from pocketzo.runtime.queries import GroupLoss, group_loss, group_rows, one_of_each
from pocketzo.runtime.session import Session, open_plain, open_with_constants
from pocketzo.runtime.variables import declare_inputs, has_constants, model_with_variables
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
    queries : bool
    cut : Cut or None
        Of `bundle`, whose front is run once for each example.
    """

    bundle: Bundle
    threads: int
    prepack: bool | Literal["auto"]
    verify: Verify
    max_memory: int | None
    forward_seconds: Mapping[int, float]
    queries: bool = False
    cut: Cut | None = None

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
        if self.queries:
            return self._load_for_queries()
        reason, missed = "as asked for", True
        layouts = [self._load_over_base] if frozen_base(self.bundle) else []
        if self.bundle.adapter is None:
            layouts.append(self._load_prepacked)
        for load in layouts if self.prepack else ():
            try:
                return load()
            except (NotPrepackableError, DeadWeightError, MemoryError, OSError) as error:  # another may need less
                reason, missed = first_line(error), not isinstance(error, NothingToPrepackError)
        if self.prepack is True:
            raise Error(f"{self.bundle.path}: the weights cannot be prepacked: {reason}")
        if self.cut is not None:
            return self._load_back(self.cut, reason)
        loaded = None
        constants = self.prepack and has_constants(self.bundle)
        if constants:
            with contextlib.suppress(NotPrepackableError, DeadWeightError, MemoryError, MemoryLimitError):
                loaded = self._load_with_constants(reason)
        model, idle = loaded or self._load_plain(reason)
        if self.bundle.is_fp16:
            if not has_fp16_arithmetic():
                warnings.warn(
                    "this processor does not compute in fp16: onnxruntime converts each weight at every use, which is "
                    "slow",
                    stacklevel=4,
                )
        elif self.prepack and (missed or (constants and not loaded)):
            what = "constants, but not weights, are" if loaded else "weights are not"
            warnings.warn(f"{what} prepacked, which is slower: {reason}", stacklevel=4)
        return model, idle

    def _load_plain(self, reason: str) -> tuple[Model, tuple[str, ...]]:
        weights = Weights(self.bundle)
        read_as_noise(weights, self.bundle)  # constants must be there when the session folds them
        reference = unoptimised_outputs(self.bundle, weights.image.values)
        model = self._model(weights, open_plain(self.bundle, weights.image.values, self.threads), reason)
        return model, check_plain(model, *reference, self.verify)

    def _load_over_base(self) -> tuple[Model, tuple[str, ...]]:
        """Load a model of which only trained weights are in memory that is written."""
        if self.max_memory is not None:
            check_room(self.bundle, self.max_memory)
        graph = model_over_base(self.bundle)
        weights = trained_weights(self.bundle)
        write_noise(weights, trainable(self.bundle))
        reference = unoptimised_outputs(self.bundle, weights.image.values, graph)  # unmaps the base before it is packed
        write_noise(weights, trainable(self.bundle), draw=4)  # a prepacked copy must not be of the noise of the check
        if self.cut is not None:
            graph = model_over_base(self.bundle, edit=self._back)
        session = self._whole(open_with_constants(self.bundle, graph, weights.image.values, self.threads))
        write_noise(weights, trainable(self.bundle))
        model = self._model(weights, session, None)
        return model, check_plain(model, *reference, self.verify)

    def _load_for_queries(self) -> tuple[Model, tuple[str, ...]]:
        """Load a model that takes several directions at once; all that is not trained stays in the file."""
        bundle = self.bundle
        if self.max_memory is not None:
            check_room(bundle, self.max_memory)
        losses: list[GroupLoss | None] = []

        def edit(model: Any) -> None:
            if self.cut is not None:
                self.cut.back(model)
            group_rows(model, bundle)
            losses.append(group_loss(model.graph, bundle))

        try:
            graph, plain = model_over_base(bundle, edit=edit), model_over_base(bundle)
        except NotPrepackableError as error:
            raise Error(f"{bundle.path}: several directions cannot be run in one forward pass: {error}") from None
        weights = Weights(bundle, Image.allocate(bundle, without=[t.name for t in bundle.tensors if not t.trainable]))
        write_noise(weights, trainable(bundle))
        reference = unoptimised_outputs(bundle, weights.image.values, plain)
        write_noise(weights, trainable(bundle), draw=4)
        values = one_of_each(weights)
        try:
            session = self._whole(open_with_constants(bundle, graph, values, self.threads))
        except NotPrepackableError as error:
            raise Error(f"{bundle.path}: several directions cannot be run in one forward pass: {error}") from None
        model = self._model(weights, session, None, takes_queries=True, group_loss=losses[0], values=values)
        check_groups(model)
        write_noise(weights, trainable(bundle))
        return model, check_plain(model, *reference, self.verify)

    def _load_back(self, cut: Cut, reason: str) -> tuple[Model, tuple[str, ...]]:
        """Load a model that is cut, whose back is in the plain layout but for constants."""
        back = cut.back_model()
        declare_inputs(back.graph, self.bundle)
        weights = Weights(self.bundle, Image.allocate(self.bundle, without=self._unread(back)))
        read_as_noise(weights, self.bundle)
        reference = unoptimised_outputs(self.bundle, weights.image.values, model_over_base(self.bundle))
        write_noise(weights, trainable(self.bundle), draw=4)
        session = open_with_constants(self.bundle, back.SerializeToString(), weights.image.values, self.threads)
        write_noise(weights, trainable(self.bundle))
        model = self._model(weights, self._whole(session), reason)
        return model, check_plain(model, *reference, self.verify)

    def _load_with_constants(self, reason: str) -> tuple[Model, tuple[str, ...]]:
        """Load a model in the plain layout whose constants are prepacked by onnxruntime."""
        if self.max_memory is not None:
            check_room(self.bundle, self.max_memory, copies=self.bundle.weights_nbytes)
        model = model_with_variables(self.bundle)
        weights = Weights(self.bundle)
        read_as_noise(weights, self.bundle)
        reference = unoptimised_outputs(self.bundle, weights.image.values)
        write_noise(weights, trainable(self.bundle), draw=4)  # a prepacked copy must not be of the noise of the check
        session = open_with_constants(self.bundle, model, weights.image.values, self.threads)
        write_noise(weights, trainable(self.bundle))
        loaded = self._model(weights, session, f"{reason}; constants are")
        return loaded, check_plain(loaded, *reference, self.verify)

    def _load_prepacked(self) -> tuple[Model, tuple[str, ...]]:
        graph = () if self.cut is None else (self.cut.back_model(),)
        plan = plan_prepacking(self.bundle, *graph)
        if self.max_memory is not None:
            try:
                check_room(self.bundle, self.max_memory, plan.matrices)
            except MemoryLimitError as error:
                raise NotPrepackableError(str(error)) from None
        batches, expected = noise_outputs(self.bundle)  # freed before there is prepacked memory: never two copies
        image = Image.allocate(self.bundle, without=plan.only_prepacked | self._unread(plan.model))
        if not all(tensor.trainable for tensor in self.bundle.tensors):
            Weights(self.bundle, image).read()  # the session prepacks and folds constants
        back, locations, slices = open_session(plan, image.values, self.threads)
        session = self._whole(back)
        weights = Weights(self.bundle, image, locations)
        read_as_noise(weights, self.bundle)
        model = self._model(weights, session, None, slices=slices)
        return model, check_prepacked(model, batches, expected, self.verify)

    def _back(self, model: Any) -> None:
        assert self.cut is not None
        self.cut.back(model)
        declare_inputs(model.graph, self.bundle)

    def _unread(self, model: Any) -> set[str]:
        """Return the weights that the back does not read: they stay in the file."""
        if self.cut is None:
            return set()
        read = {tensor.name for tensor in model.graph.initializer}
        return {tensor.name for tensor in self.bundle.tensors if not tensor.trainable and tensor.name not in read}

    def _whole(self, session: Session) -> Session:
        """Return a session of the whole graph, if `session` is of the back of one that is cut."""
        cut = self.cut
        if cut is None:
            return session
        halves = Halves(cut, lambda: open_with_constants(cut.bundle, cut.front_model(), {}, self.threads), session)
        halves.check_rows()  # before other checks, which would find the same and not say why
        return halves

    def _model(self, weights: Weights, session: Session, reason: str | None, **more: Any) -> Model:
        return Model(
            self.bundle,
            weights,
            session,
            threads=self.threads,
            max_memory=self.max_memory,
            forward_seconds=self.forward_seconds,
            not_prepacked_because=reason,
            **more,
        )


def check_room(bundle: Bundle, most: int, matrices: Sequence[Matrix] = (), copies: int = 0) -> None:
    """Check that loading a bundle would not take more than ``most`` bytes.

    Parameters
    ----------
    bundle : Bundle
    most : int
    matrices : sequence of Matrix
        The weights that are to be prepacked.
    copies : int
        Bytes of what onnxruntime copies.

    Raises
    ------
    MemoryLimitError
        It would, with figures.
    """
    resident = resident_memory()
    weights = bundle.weights_nbytes
    weights += copies + sum(matrix.nbytes for matrix in matrices if matrix.shared)
    room = room_to_load(weights, max((matrix.nbytes for matrix in matrices), default=0))
    if resident + weights + room > most:
        raise MemoryLimitError(
            f"{bundle.path}: loading takes {megabytes(resident + weights + room)} ({megabytes(weights)} of weights, "
            f"{megabytes(room)} to work with, {megabytes(resident)} in use already), and the limit is {megabytes(most)}"
        )


def room_to_load(weights: int, largest: int) -> int:
    """Return the bytes that loading takes beside the weights.

    Parameters
    ----------
    weights : int
        Bytes of all weights.
    largest : int
        Bytes of the largest matrix that is prepacked; 0 if none is.
    """
    # sessions and checks took 15 to 54 MB with 23 M to 355 M parameters; onnxruntime packs one matrix at a time
    return weights // 16 + SMALL + 3 * largest
