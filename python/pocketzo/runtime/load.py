"""A model that runs and whose weights can be written while it does."""

from __future__ import annotations

import os
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pocketzo._core import MAX_THREADS, has_fp16_arithmetic
from pocketzo._core import threads as kernel_threads
from pocketzo.errors import DeadWeightError, Error, MemoryLimitError, NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.machine import cores
from pocketzo.machine.memory import resident_memory
from pocketzo.runtime.layout import Matrix
from pocketzo.runtime.layout import matrices as matrices_of
from pocketzo.runtime.liveness import (
    fill_with_noise,
    float_outputs,
    outputs_match,
    read_as_noise,
    trainable_tensors,
    unoptimised_outputs,
    unseen_weights,
)
from pocketzo.runtime.model import SMALL, Batch, Model, megabytes
from pocketzo.runtime.prepack import open_session
from pocketzo.runtime.session import create_session, optimization_level, ort_values
from pocketzo.runtime.threads import quickest, time_forwards
from pocketzo.runtime.weights import Weights


def load(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    threads: int | None = None,
    batch: Batch | None = None,
    prepack: bool | Literal["auto"] = "auto",
    verify: Literal["auto", "fast", "full"] = "auto",
    max_memory: int | None = None,
) -> Model:
    """Load a bundle so that session and weights share one memory, and prove that they do.

    Parameters
    ----------
    bundle : path or Bundle
        A folder written by ``pocketzo prepare``, or what :meth:`Bundle.read` made of it.
    threads : int, optional
        Threads of the session; by default as many as there are fast cores. Those of the kernels are others, see
        :func:`pocketzo.kernels.set_threads`; by default the session has no more than they.
    batch : mapping of str to ndarray, optional
        If given, and ``threads`` is not, a few forward passes of this batch are timed with 1 thread, 2, as many as
        there are fast cores, and as many as there are cores, and the quickest number is taken. Best a batch as those
        to come. It takes no more memory than training, and up to a second, or one pass, a number. The number may
        change the roundings of losses: give ``threads`` where two runs have to be the same.
    prepack : bool or "auto"
        Whether weights lie in memory as onnxruntime's matrix products like them best, which makes forward passes up to
        twice as fast, or as they are stored. "auto" prepacks where it can and otherwise warns and works; True insists.
        fp16 weights are never prepacked.
        The weights that training makes are the same for the same record; losses differ in their roundings.
    verify : {"auto", "fast", "full"}
        How it is proved that each trainable weight is live. "fast" fills all of them with noise and compares the
        outputs with those of a second session that optimises nothing, and so reads every weight where it stands; this
        takes two short runs. "full" also changes one weight after the other and wants to see the outputs move, which
        takes a short run a weight and finds those that nothing uses, too. "auto" is "full" where that takes less than
        two seconds or so, as it does up to some 100 M parameters.
    max_memory : int, optional
        Bytes of this process that may be resident. Loading is refused where the weights would take more, and a run of
        the model is broken off before it does; a step of training is then undone, and the run can be resumed.

    Raises
    ------
    BundleError
        The bundle is incomplete or damaged.
    DeadWeightError
        The session does not see what is written to a trainable weight; names it.
    MemoryLimitError
        ``max_memory`` is less than loading takes, with figures.
    Error
        ``prepack`` is True, and the weights cannot be prepacked here; says why. Or a limit is given, and the system
        does not report how much memory this process takes.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(Path(bundle))
    _check_integer("threads", threads, MAX_THREADS)
    _check_integer("max_memory", max_memory, 2**63)
    _check_batch(batch)
    if prepack not in (True, False, "auto"):
        raise ValueError(f"prepack must be True, False or 'auto', got {prepack!r}")
    if verify not in ("auto", "fast", "full"):
        raise ValueError(f"verify must be 'auto', 'fast' or 'full', got {verify!r}")
    if max_memory is not None:
        _check_memory(max_memory, bundle)
    seconds: dict[int, float] = {}
    if threads is None:
        counts = cores.thread_counts()
        if batch is not None and len(counts) > 1:
            seconds = time_forwards(bundle, batch, counts, max_memory)
            threads = quickest(seconds)
        else:
            threads = min(cores.fast(), kernel_threads())
    model = _load(bundle, threads, prepack, verify, max_memory)
    model.forward_seconds = seconds
    return model


def _check_integer(name: str, value: object, most: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be in 1 .. {most}, got {value}")


def _check_batch(batch: object) -> None:
    if batch is None:
        return
    if not isinstance(batch, Mapping) or not all(isinstance(array, np.ndarray) for array in batch.values()):
        raise TypeError(f"batch must be a mapping of names to arrays, got {reprlib.repr(batch)}")


def _load(bundle: Bundle, threads: int, prepack: bool | Literal["auto"], verify: str, max_memory: int | None) -> Model:
    reason = "as asked for"
    if prepack:
        try:
            model = _load_prepacked(bundle, threads, verify, max_memory)
            model.max_memory = max_memory
            return model
        except (
            NotPrepackableError,
            MemoryError,
            OSError,
        ) as error:  # what is lacking may be enough in the plain layout
            reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
            if prepack is True:
                raise Error(f"{bundle.path}: the weights cannot be prepacked: {reason}") from None
    model = _load_plain(bundle, threads, verify, reason)
    model.max_memory = max_memory
    if bundle.is_fp16:
        if not has_fp16_arithmetic():
            warnings.warn(
                "this processor does not compute in fp16: onnxruntime converts each weight at every use, which is slow",
                stacklevel=3,
            )
    elif prepack:
        warnings.warn(f"weights are not prepacked, which is slower: {reason}", stacklevel=3)
    return model


def _check_memory(most: int, bundle: Bundle, matrices: Sequence[Matrix] = ()) -> None:
    """Raise a :class:`MemoryLimitError` where loading would take more than ``most`` bytes."""
    resident = resident_memory()
    weights = bundle.weights_path.stat().st_size
    weights += sum(4 * matrix.packing.size for matrix in matrices if matrix.shared)
    room = weights // 16 + SMALL  # sessions and the proof took 15 to 54 MB with 23 M to 355 M parameters
    room += max((3 * 4 * matrix.packing.size for matrix in matrices), default=0)  # as the runtime packs one
    if resident + weights + room > most:
        raise MemoryLimitError(
            f"{bundle.path}: loading takes {megabytes(resident + weights + room)} ({megabytes(weights)} of weights, "
            f"{megabytes(room)} to work with, {megabytes(resident)} in use already), and the limit is {megabytes(most)}"
        )


def _load_plain(bundle: Bundle, threads: int, verify: str, reason: str) -> Model:
    weights = Weights(bundle)
    read_as_noise(weights, bundle)
    values = ort_values(weights)
    session = create_session(bundle.model_path, values, threads, prepacked=False, level=optimization_level(bundle))
    model = Model(bundle, weights, session, threads, values, not_prepacked_because=reason)

    def match() -> bool:
        # Where fp16 is computed in, a fused operator rounds less often than those that it stands for.
        tolerance = 3e-2 if bundle.is_fp16 else 1e-3
        return outputs_match(float_outputs(bundle, session), unoptimised_outputs(bundle, values), tolerance)

    try:
        as_one = match()
        unseen = unseen_weights(model, verify, as_one=as_one)
        if not as_one and not unseen:
            # Each is seen somewhere, but a use of one was folded into a copy. On the stored weights all copies are
            # right, so that changing one weight at a time shows which.
            weights.read()
            for tensor in trainable_tensors(bundle):
                fill_with_noise(weights, [tensor])
                if not match():
                    unseen.append(tensor.name)
                weights.read()
    finally:
        weights.read()
    if unseen:
        names = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
        raise DeadWeightError(
            f"{bundle.path}: the session does not see what is written to {names}. Prepare the model again with "
            f"`pocketzo prepare`, or leave these out of what is trainable"
        )
    if not as_one:
        raise DeadWeightError(
            f"{bundle.path}: the session's outputs differ from those of a session without optimisations, though "
            f"every single weight is seen"
        )
    return model


def _load_prepacked(bundle: Bundle, threads: int, verify: str, max_memory: int | None) -> Model:
    matrices = matrices_of(bundle)
    if max_memory is not None:
        try:
            _check_memory(max_memory, bundle, matrices)
        except MemoryLimitError as error:
            raise NotPrepackableError(str(error)) from None
    # The reference comes and goes before there is a packed weight: there is never more than one copy.
    weights = Weights(bundle)
    read_as_noise(weights, bundle)
    expected = unoptimised_outputs(bundle, ort_values(weights))
    del weights
    weights = Weights(bundle, {matrix.name for matrix in matrices if not matrix.shared})
    values = ort_values(weights)
    session, locations = open_session(bundle, lambda path: create_session(path, values, threads, prepacked=True))
    weights.attach(locations)
    read_as_noise(weights, bundle)
    model = Model(bundle, weights, session, threads, values, not_prepacked_because=None)
    try:
        as_one = outputs_match(float_outputs(bundle, session), expected)
        unseen = unseen_weights(model, verify, as_one=as_one)
    finally:
        weights.read()
    if unseen or not as_one:
        if not unseen:
            raise NotPrepackableError("the outputs differ from those of a session without optimisations")
        raise NotPrepackableError(f"the session does not see all that is written to {', '.join(unseen[:5])}")
    return model
