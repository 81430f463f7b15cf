"""``pocketzo.load``: checks its arguments and chooses the number of threads."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from pocketzo._core import MAX_THREADS
from pocketzo._core import threads as kernel_threads
from pocketzo.arguments import check_integer
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.probe import Probe, check_probe
from pocketzo.machine import cores
from pocketzo.machine.memory import trim_heap
from pocketzo.runtime.cut import Cut
from pocketzo.runtime.liveness import Verify
from pocketzo.runtime.loader import Loader, check_room
from pocketzo.runtime.model import Batch, Model
from pocketzo.runtime.threads import quickest, time_forwards


def load(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    threads: int | None = None,
    batch: Batch | None = None,
    prepack: bool | Literal["auto"] = "auto",
    verify: Verify = "auto",
    max_memory: int | None = None,
    queries: bool = False,
    cut: Cut | None = None,
) -> Model:
    """Load a bundle into a session that shares one buffer with the weights, and check that it does.

    Parameters
    ----------
    bundle : path or Bundle
        A folder written by ``pocketzo prepare``, or the result of :meth:`Bundle.read`.
    threads : int, optional
        Threads of the session; by default the number of fast cores, but no more than the kernels have. The kernels'
        threads are set by :func:`pocketzo.kernels.set_threads`.
    batch : mapping of str to ndarray, optional
        If given, and ``threads`` is not, a few forward passes of this batch are timed with 1 thread, 2, as many as
        there are fast cores, and as many as there are cores, and the quickest number is taken. The batch should be like
        those to come. Timing takes no more memory than training, and up to a second, or one pass, a number. The number
        may change the roundings of losses: give ``threads`` where two runs have to be the same. Where the bundle has no
        probing batch, the checks take this one, with an array for each input.
    prepack : bool or "auto"
        Whether to use onnxruntime's prepacked weight layout, which makes forward passes up to twice as fast, or the
        plain layout of the file. "auto" prepacks where it is possible, and otherwise warns and uses the plain layout;
        True raises an error there. With "auto", onnxruntime packs copies of constants, such as quantised weights, in
        the plain layout, too. fp16 weights are never prepacked. The weights that a journal yields are the same in
        both layouts; losses differ in their roundings.
    verify : {"auto", "fast", "full"}
        How to check that each trainable weight is live. "fast" fills all of them with noise and compares the outputs
        with those of a second session that optimises nothing, and so reads every weight where it is; this takes two
        short runs. "full" also changes one weight after the other and expects the outputs to change, which takes a
        short run a weight. Weights that change nothing are tried on more inputs, and with more values, in both
        sessions; those that change nothing in either are named by a warning: nothing uses them, or only with other
        inputs. "auto" is "full" where that takes less than about two seconds, as it does up to some 100 M parameters.
    max_memory : int, optional
        Limit on the resident memory of this process, in bytes. Loading is refused where the weights would take more. A
        run of the model is stopped before it exceeds the limit; a step of training is then undone, and the run can be
        resumed.
    queries : bool
        Whether a forward pass may take several directions at once, as an optimizer with ``share`` evaluates them. The
        trained tensors must be those that ``prepare --train lora``, ``ia3``, ``adapter:R`` or ``prefix:N`` adds, or be
        used in the same way. Constants are prepacked, and trained tensors are not.
    cut : Cut, optional
        The result of :func:`plan_cut` for this bundle: what comes before the first trained tensor is run once for each
        example and kept, in memory or in ``model.halves.store``. Only the cut's tensors can then be trained.

    Returns
    -------
    Model

    Raises
    ------
    BundleError
        The bundle is incomplete or damaged; or its trained tensors are not such that ``queries`` are possible.
    DeadWeightError
        The session does not see what is written to a trainable weight; names it.
    NotCuttableError
        What comes before the cut depends on padding, or on other examples of a batch.
    MemoryLimitError
        ``max_memory`` is less than loading takes, with figures.
    Error
        ``prepack`` is True and the weights cannot be prepacked here; says why. Or ``max_memory`` is given and the
        system does not report how much memory this process takes. Or ``queries`` are asked for and the package protobuf
        is missing.
    TypeError, ValueError
        An argument is of the wrong type, or out of range.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(Path(bundle))
    if threads is not None:
        check_integer("threads", threads, 1, MAX_THREADS)
    if max_memory is not None:
        check_integer("max_memory", max_memory, 1, 2**63)
    _check_batch(batch)
    if prepack not in (True, False, "auto"):
        raise ValueError(f"prepack must be True, False or 'auto', got {prepack!r}")
    if queries and prepack is not True and prepack != "auto":
        raise ValueError("with queries, constants are prepacked: leave prepack=False (--no-prepack) out")
    if verify not in get_args(Verify):
        raise ValueError(f"verify must be 'auto', 'fast' or 'full', got {verify!r}")
    trim_heap()
    if cut is not None and cut.bundle.path != bundle.path:
        raise ValueError(f"{bundle.path}: the cut is of another bundle, {cut.bundle.path}")
    checked = bundle if cut is None else cut.bundle
    if bundle.probe is None and batch is not None:
        checked = replace(checked, probe=_fitting(bundle, batch))
    if max_memory is not None:
        check_room(bundle, max_memory)
    seconds: dict[int, float] = {}
    if threads is None:
        counts = cores.thread_counts()
        if batch is not None and len(counts) > 1:
            seconds = time_forwards(checked, batch, counts, max_memory)
            threads = quickest(seconds)
        else:
            threads = min(cores.fast(), kernel_threads())
    model = Loader(
        checked,
        threads=threads,
        prepack=prepack,
        verify=verify,
        max_memory=max_memory,
        forward_seconds=seconds,
        queries=queries,
        cut=cut,
    ).load()
    model.bundle = bundle  # as it is on disk
    trim_heap()
    return model


def _fitting(bundle: Bundle, batch: Batch) -> Probe:
    names = {value.name for value in bundle.inputs}
    try:
        return check_probe({name: array for name, array in batch.items() if name in names}, bundle.inputs)
    except ValueError as error:
        raise ValueError(f"batch: {error}") from None


def _check_batch(batch: object) -> None:
    if batch is None:
        return
    if not isinstance(batch, Mapping) or not all(isinstance(array, np.ndarray) for array in batch.values()):
        raise TypeError(f"batch must be a mapping of names to arrays, got {reprlib.repr(batch)}")
