"""A model that runs and whose weights can be written while it does."""

from __future__ import annotations

import math
import os
import reprlib
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo import _core, cores
from pocketzo import packed as packing
from pocketzo.bundle import Bundle, TensorSpec
from pocketzo.errors import BundleError, DeadWeightError, Error, MemoryLimitError
from pocketzo.memory import resident_memory, watch
from pocketzo.weights import Weights

__all__ = ["Batch", "Model", "load"]


Batch = Mapping[str, NDArray[Any]]

# onnxruntime's optimisations that put a copy, made when the session is created, in the place of weights: scaled,
# transposed, blocked or concatenated. With 1.31.1 each but the first was seen to make a weight dead.
_COPYING_OPTIMIZERS = [
    "AttentionFusion",
    "ConvAddFusion",
    "ConvBNFusion",
    "ConvMulFusion",
    "MatMul_BatchNormalization_Fusion",
    "NchwcTransformer",
    "TransposeOptimizer",
    "TransposeOptimizer_CPUExecutionProvider",
]


# Measured by bench/session.py; the figures stand in bench/README.md.
_LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
_HALF_LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # above it, casts of fp16 weights are folded into copies
_OPTIONS = {
    "enable_cpu_mem_arena": True,
    "enable_mem_pattern": False,  # it plans memory for one shape of batch, beside what the first run took
}
_ENTRIES = {
    # A thread that spins during a run is at the next operator at once; after it, it would keep a core from the kernels.
    "session.intra_op.allow_spinning": "1",
    "session.force_spinning_stop": "1",
}


_SMALL = 16 << 20  # bytes that are in use for many small things


class Model:
    """A bundle loaded by :func:`load`: an onnxruntime session and the weights that it computes with.

    Attributes
    ----------
    bundle : Bundle
        What was loaded.
    weights : Weights
        Arrays by name; what is written is seen by the next run.
    threads : int
        Threads of the session.
    forward_seconds : dict of int to float
        Time of a forward pass by number of threads, where the number was chosen by that; else empty.
    packed : bool
        Whether the session multiplies by packed weights.
    unpacked_because : str or None
        Why it does not.
    max_memory : int or None
        The limit that was given to :func:`load`.
    """

    max_memory: int | None = None

    def __init__(
        self,
        bundle: Bundle,
        weights: Weights,
        session: ort.InferenceSession,
        threads: int,
        values: Mapping[str, ort.OrtValue],
        *,
        unpacked_because: str | None,
    ) -> None:
        self.bundle = bundle
        self.weights = weights
        self.threads = threads
        self.forward_seconds: Mapping[int, float] = {}
        self.packed = unpacked_because is None
        self.unpacked_because = unpacked_because
        self._session = session
        self._values = values  # the session uses their memory
        self._inputs = {value.name: value for value in bundle.inputs}
        self._outputs = [value.name for value in bundle.outputs]

    def run(self, batch: Batch, outputs: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Parameters
        ----------
        batch : mapping of str to ndarray
            The inputs by name; arrays that are no input of the graph are passed over. Without ``labels`` there is no
            loss among the outputs.
        outputs : iterable of str, optional
            Which outputs to compute; all of them by default.

        Returns
        -------
        dict of str to ndarray
            The outputs by name.

        Raises
        ------
        MemoryLimitError
            It was broken off, as this process had come close to the limit that was given to :func:`load`.
        """
        self.weights.settle()
        names = self._outputs if outputs is None else list(outputs)
        feed = {name: array for name, array in batch.items() if name in self._inputs}
        if not feed:
            raise ValueError(f"the graph's inputs are {', '.join(self._inputs)}; got {', '.join(batch) or 'none'}")
        if "labels" in self._inputs and "labels" not in feed and (outputs is None or self.bundle.loss not in names):
            # The runtime wants every input, also those that only the loss needs.
            labels = self._inputs["labels"]
            names = [name for name in names if name != self.bundle.loss]
            first = next(iter(feed.values()))
            feed["labels"] = np.zeros(first.shape[: len(labels.shape)], labels.dtype)
        try:
            return dict(zip(names, self._run(names, feed), strict=True))
        except (ValueError, Error):
            raise  # ours, or an input is missing or of another type, which the runtime's message says
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise Error(
                f"{self.bundle.path}: the model cannot be run on this batch (is a text too long for it, or the "
                f"tokenizer that of another model?): {error}"
            ) from error

    def _run(self, names: list[str], feed: Batch) -> list[NDArray[Any]]:
        if self.max_memory is None:
            return self._session.run(names, feed)  # type: ignore[no-any-return]
        shape = max((array.shape for array in feed.values()), key=math.prod)
        reserve = self._reserve(shape)
        options = ort.RunOptions()
        with watch(self.max_memory - reserve, lambda: setattr(options, "terminate", True)) as readings:
            try:
                values: list[NDArray[Any]] = self._session.run(names, feed, options)
            except Exception:
                if not readings:
                    raise
        if readings:
            raise MemoryLimitError(
                f"a forward pass of {' x '.join(map(str, shape))} tokens was broken off: {_mb(readings[0])} were in "
                f"use, what it does next may take {_mb(reserve)} more, and the limit is {_mb(self.max_memory)}. Take a "
                f"smaller batch, prepare the model with a smaller max_length, or allow more"
            )
        return values

    def _reserve(self, shape: Sequence[int]) -> int:
        """Return more than one operator takes in a forward pass of ``shape`` examples x tokens, as a rule.

        The runtime breaks a pass off between two operators only. The largest outputs are those of the widest matrix,
        the attention's scores (as wide as that at 256 tokens, with heads of 64 and the usual four times as wide
        feed-forward), and logits by token. Twice that is two operators between two looks, or one and what it works on.
        """
        matrices = [tensor.shape[1] for tensor in self.bundle.tensors if len(tensor.shape) == 2]
        widest = max(matrices, default=1) * max(256, shape[-1]) // 256
        logits = [value.shape[-1] for value in self.bundle.outputs if len(value.shape) > 2]
        widest = max(widest, *(size for size in logits if isinstance(size, int)), 1)
        casts = 0
        if self.bundle.is_half and not _core.has_half_arithmetic():  # the runtime copies a weight to use it
            casts = max(4 * math.prod(tensor.shape) for tensor in self.bundle.tensors)
        return 2 * 4 * math.prod(shape) * widest + casts + _SMALL

    def loss(self, batch: Batch) -> float:
        """Run the graph and return its loss."""
        if self.bundle.loss is None:
            raise BundleError(f"{self.bundle.path}: the graph has no loss output; give an objective of your own")
        return float(self.run(batch, [self.bundle.loss])[self.bundle.loss])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a bundle with the weights as they are now."""
        self.bundle.copy_to(Path(path), self.weights.save)


def load(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    threads: int | None = None,
    batch: Batch | None = None,
    packed: bool | Literal["auto"] = "auto",
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
    packed : bool or "auto"
        Whether weights lie in memory as onnxruntime's matrix products like them best, which makes forward passes up to
        twice as fast, or as they are stored. "auto" packs where it can and otherwise warns and works; True insists.
        fp16 weights are never packed.
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
        ``packed`` is True, and the weights cannot be packed here; says why. Or the system does not tell how much memory
        this process takes.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(Path(bundle))
    _check_integer("threads", threads, _core.MAX_THREADS)
    _check_integer("max_memory", max_memory, 2**63)
    _check_batch(batch)
    if packed not in (True, False, "auto"):
        raise ValueError(f"packed must be True, False or 'auto', got {packed!r}")
    if verify not in ("auto", "fast", "full"):
        raise ValueError(f"verify must be 'auto', 'fast' or 'full', got {verify!r}")
    if max_memory is not None:
        _check_memory(max_memory, bundle)
    seconds: dict[int, float] = {}
    if threads is None:
        counts = cores.thread_counts()
        if batch is not None and len(counts) > 1:
            seconds = _time_forwards(bundle, batch, counts, max_memory)
            threads = _quickest(seconds)
        else:
            threads = min(cores.fast(), _core.threads())
    model = _load(bundle, threads, packed, verify, max_memory)
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


def _load(bundle: Bundle, threads: int, packed: bool | Literal["auto"], verify: str, max_memory: int | None) -> Model:
    reason = "as asked for"
    if packed:
        try:
            model = _load_packed(bundle, threads, verify, max_memory)
            model.max_memory = max_memory
            return model
        except (packing.UnpackableError, MemoryError, OSError) as error:  # what is lacking may be enough unpacked
            reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
            if packed is True:
                raise Error(f"{bundle.path}: the weights cannot be packed: {reason}") from None
    model = _load_unpacked(bundle, threads, verify, reason)
    model.max_memory = max_memory
    if bundle.is_half:
        if not _core.has_half_arithmetic():
            warnings.warn(
                "this processor does not compute in fp16: onnxruntime converts each weight at every use, which is slow",
                stacklevel=3,
            )
    elif packed:
        warnings.warn(f"weights are used unpacked, which is slower: {reason}", stacklevel=3)
    return model


def _check_memory(most: int, bundle: Bundle, matrices: Sequence[packing.Matrix] = ()) -> None:
    """Raise a :class:`MemoryLimitError` where loading would take more than ``most`` bytes."""
    resident = resident_memory()
    weights = bundle.weights_path.stat().st_size
    weights += sum(4 * matrix.packing.size for matrix in matrices if not matrix.alone)
    room = weights // 16 + _SMALL  # sessions and the proof took 15 to 54 MB with 23 M to 355 M parameters
    room += max((3 * 4 * matrix.packing.size for matrix in matrices), default=0)  # as the runtime packs one
    if resident + weights + room > most:
        raise MemoryLimitError(
            f"{bundle.path}: loading takes {_mb(resident + weights + room)} ({_mb(weights)} of weights, {_mb(room)} to "
            f"work with, {_mb(resident)} in use already), and the limit is {_mb(most)}"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _time_forwards(bundle: Bundle, batch: Batch, counts: Iterable[int], max_memory: int | None) -> dict[int, float]:
    """Return the least time of a few forward passes with each number of threads.

    A session has its threads for life, so each number takes one of its own. They are unpacked and share the weights,
    and so are quick to make; one comes when the one before it has gone, with its activations. Packed, the second thread
    was worth as much: 1.75 times the speed (BERT-base's shape, 1 x 16 and 8 x 64 tokens; bench/session.py).
    """
    weights = Weights(bundle)
    _read_as_noise(weights, bundle)
    values = _values(weights)
    outputs = [bundle.loss] if bundle.loss is not None and "labels" in batch else None
    seconds = {}
    for threads in counts:
        session = _session(bundle.model_path, values, threads, packed=False, level=_level(bundle))
        model = Model(bundle, weights, session, threads, values, unpacked_because="for timing")
        model.max_memory = max_memory
        times: list[float] = []
        while len(times) < 5 and sum(times) < 1:
            started = time.perf_counter()
            model.run(batch, outputs)
            times.append(time.perf_counter() - started)
        seconds[threads] = round(min(times), 6)
        del model, session
    return seconds


def _quickest(seconds: Mapping[int, float]) -> int:
    """Return the number of threads with the least time, or a smaller one that is as good: it keeps the phone cooler."""
    return min(threads for threads, took in seconds.items() if took <= 1.05 * min(seconds.values()))


def _load_unpacked(bundle: Bundle, threads: int, verify: str, reason: str) -> Model:
    weights = Weights(bundle)
    _read_as_noise(weights, bundle)
    values = _values(weights)
    session = _session(bundle.model_path, values, threads, packed=False, level=_level(bundle))
    model = Model(bundle, weights, session, threads, values, unpacked_because=reason)

    def agree() -> bool:
        # Where fp16 is computed in, a fused operator rounds less often than those that it stands for.
        tolerance = 3e-2 if bundle.is_half else 1e-3
        return _agree(_outputs(model), _reference(bundle, values), tolerance)

    try:
        as_one = agree()
        dead = _dead(model, verify, as_one=as_one)
        if not as_one and not dead:
            # Each is seen somewhere, but a use of one was folded into a copy. On the stored weights all copies are
            # right, so that changing one weight at a time shows which.
            weights.read()
            for tensor in _trainable(bundle):
                _fill_with_noise(weights, [tensor])
                if not agree():
                    dead.append(tensor.name)
                weights.read()
    finally:
        weights.read()
    if dead:
        names = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
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


def _load_packed(bundle: Bundle, threads: int, verify: str, max_memory: int | None) -> Model:
    matrices = packing.matrices(bundle)
    if max_memory is not None:
        try:
            _check_memory(max_memory, bundle, matrices)
        except MemoryLimitError as error:
            raise packing.UnpackableError(str(error)) from None
    # The reference comes and goes before there is a packed weight: there is never more than one copy.
    weights = Weights(bundle)
    _read_as_noise(weights, bundle)
    expected = _reference(bundle, _values(weights))
    del weights
    weights = Weights(bundle, {matrix.name for matrix in matrices if matrix.alone})
    values = _values(weights)
    session, places = packing.open_session(bundle, lambda path: _session(path, values, threads, packed=True))
    weights.attach(places)
    _read_as_noise(weights, bundle)
    model = Model(bundle, weights, session, threads, values, unpacked_because=None)
    try:
        as_one = _agree(_outputs(model), expected)
        dead = _dead(model, verify, as_one=as_one)
    finally:
        weights.read()
    if dead or not as_one:
        if not dead:
            raise packing.UnpackableError("the outputs differ from those of a session without optimisations")
        raise packing.UnpackableError(f"the session does not see all that is written to {', '.join(dead[:5])}")
    return model


def _trainable(bundle: Bundle) -> list[TensorSpec]:
    return [tensor for tensor in bundle.tensors if tensor.trainable]


def _level(bundle: Bundle) -> ort.GraphOptimizationLevel:
    return _HALF_LEVEL if bundle.is_half else _LEVEL


def _values(weights: Weights) -> dict[str, ort.OrtValue]:
    return {name: ort.OrtValue.ortvalue_from_numpy(view) for name, view in weights.plain.items()}


def _session(
    graph: Path,
    values: Mapping[str, ort.OrtValue],
    threads: int,
    *,
    packed: bool,
    level: ort.GraphOptimizationLevel = _LEVEL,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    disabled = _COPYING_OPTIMIZERS
    if packed:
        disabled = disabled + packing.OTHER_OPERATORS
    else:
        # A packed copy of a weight would be used in place of the weight.
        options.add_session_config_entry("session.disable_prepacking", "1")
    for name, value in _OPTIONS.items():
        setattr(options, name, value)
    for key, entry in _ENTRIES.items():
        options.add_session_config_entry(key, entry)
    for name, value in values.items():
        options.add_initializer(name, value)
    try:
        return ort.InferenceSession(
            os.fspath(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base
        if packed:
            raise packing.UnpackableError(f"onnxruntime {ort.__version__} refuses packed weights: {error}") from None
        raise BundleError(f"{graph}: onnxruntime refuses the graph: {error}") from error


def _read_as_noise(weights: Weights, bundle: Bundle) -> None:
    """Read weights that are not trainable, and write noise to those that are."""
    if not all(tensor.trainable for tensor in bundle.tensors):
        weights.read()
    _fill_with_noise(weights, _trainable(bundle))


def _fill_with_noise(weights: Weights, tensors: Iterable[TensorSpec], draw: int = 0) -> None:
    for tensor in tensors:
        weights.fill_with_noise(tensor, draw)


def probe_batch(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """Return a small batch that any encoder or decoder takes: 2 examples of 8 tokens."""
    batch = {}
    for value in bundle.inputs:
        shape = [size if isinstance(size, int) else 2 if axis == 0 else 8 for axis, size in enumerate(value.shape)]
        dtype = np.dtype(value.dtype)
        if "mask" in value.name:
            batch[value.name] = np.ones(shape, dtype)
        elif "label" in value.name or "type" in value.name:
            batch[value.name] = np.zeros(shape, dtype)
        elif dtype.kind in "iu":
            batch[value.name] = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 8).astype(dtype)
        else:
            noise = np.empty(shape, np.float32)
            _core.generate(noise, seed=0, tensor=0, draw=0, offset=0, direction="gaussian")
            batch[value.name] = noise.astype(dtype)
    return batch


# The proof is made on weights that are noise. A session at level DISABLE_ALL folds and packs nothing, so it is the
# reference: with any weight stale, the outputs of the two would differ by far more than their roundings do.


def _results(bundle: Bundle, session: ort.InferenceSession) -> NDArray[np.float64]:
    outputs = [value.name for value in bundle.outputs if np.dtype(value.dtype).kind == "f"]
    try:
        values = session.run(outputs, probe_batch(bundle))
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{bundle.model_path}: a run on a probing batch failed: {error}") from error
    return np.concatenate([np.ravel(value).astype(np.float64) for value in values])


def _reference(bundle: Bundle, values: Mapping[str, ort.OrtValue]) -> NDArray[np.float64]:
    level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _results(bundle, _session(bundle.model_path, values, 1, packed=False, level=level))


def _outputs(model: Model) -> NDArray[np.float64]:
    return _results(model.bundle, model._session)


def _agree(got: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float = 1e-3) -> bool:
    finite = np.isfinite(expected)  # a graph may mask some outputs by infinities
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return False
    largest = np.abs(expected[finite]).max(initial=0)  # nothing is proved by outputs that are all zero
    return bool(largest > 0 and np.abs(got[finite] - expected[finite]).max() <= tolerance * largest)


def _dead(model: Model, verify: str, *, as_one: bool) -> list[str]:
    """Change one trainable weight after the other, as far as ``verify`` asks for it, and return those not seen."""
    trainable = _trainable(model.bundle)
    started = time.perf_counter()
    before = _outputs(model)
    seconds = (time.perf_counter() - started) * len(trainable)
    if as_one and (verify == "fast" or (verify == "auto" and seconds > 2)):
        return []
    dead = []
    for tensor in trainable:
        _fill_with_noise(model.weights, [tensor], draw=1)
        after = _outputs(model)
        if np.array_equal(before, after, equal_nan=True):
            # It may be live and without effect, as the bias of attention keys is: the softmax takes it out again. A
            # weight that is not a number shows wherever it is read.
            model.weights.fill(tensor.name, np.nan)
            if np.isnan(_outputs(model)).sum() <= np.isnan(before).sum():
                dead.append(tensor.name)
            _fill_with_noise(model.weights, [tensor], draw=1)
        before = after
    return dead
