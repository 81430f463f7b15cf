"""A model that runs and whose weights can be written while it does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo import _core
from pocketzo.bundle import Bundle, TensorSpec
from pocketzo.errors import BundleError, DeadWeightError, Error
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


class Model:
    """A bundle loaded by :func:`load`: an onnxruntime session and the weights that it computes with.

    Attributes
    ----------
    bundle : Bundle
        What was loaded.
    weights : Weights
        Writable float32 views by name; what is written is seen by the next run.
    threads : int
        Threads of the session.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: Weights,
        session: ort.InferenceSession,
        threads: int,
        values: Mapping[str, ort.OrtValue],
    ) -> None:
        self.bundle = bundle
        self.weights = weights
        self.threads = threads
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
        """
        self.weights.settle()
        names = self._outputs if outputs is None else list(outputs)
        feed = {name: array for name, array in batch.items() if name in self._inputs}
        if "labels" in self._inputs and "labels" not in feed and (outputs is None or self.bundle.loss not in names):
            # The runtime wants every input, also those that only the loss needs.
            labels = self._inputs["labels"]
            names = [name for name in names if name != self.bundle.loss]
            first = next(iter(feed.values()))
            feed["labels"] = np.zeros(first.shape[: len(labels.shape)], labels.dtype)
        try:
            return dict(zip(names, self._session.run(names, feed), strict=True))
        except ValueError:
            raise  # an input is missing or of another type, which the runtime's message says
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise Error(
                f"{self.bundle.path}: the model cannot be run on this batch (is a text too long for it, or the "
                f"tokenizer that of another model?): {error}"
            ) from error

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
    verify: Literal["auto", "fast", "full"] = "auto",
) -> Model:
    """Load a bundle so that session and weights share one memory, and prove that they do.

    Parameters
    ----------
    bundle : path or Bundle
        A folder written by ``pocketzo prepare``, or what :meth:`Bundle.read` made of it.
    threads : int, optional
        Threads of the session; by default as many as the kernels use.
    verify : {"auto", "fast", "full"}
        How it is proved that each trainable weight is live. "fast" fills all of them with noise and compares the
        outputs with those of a second session that optimises nothing, and so reads every weight where it stands; this
        takes two short runs. "full" also changes one weight after the other and wants to see the outputs move, which
        takes a short run a weight and finds those that nothing uses, too. "auto" is "full" where that takes less than
        two seconds or so, as it does up to some 100 M parameters.

    Raises
    ------
    BundleError
        The bundle is incomplete or damaged.
    DeadWeightError
        The session does not see what is written to a trainable weight; names it.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(Path(bundle))
    threads = _core.threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if verify not in ("auto", "fast", "full"):
        raise ValueError(f"verify must be 'auto', 'fast' or 'full', got {verify!r}")
    weights = Weights(bundle)
    values = {name: ort.OrtValue.ortvalue_from_numpy(view) for name, view in weights.items()}
    trainable = [tensor for tensor in bundle.tensors if tensor.trainable]
    _fill_with_noise(weights, trainable)
    session = _session(bundle, values, threads, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    model = Model(bundle, weights, session, threads, values)
    try:
        _prove_live(model, trainable, verify)
    finally:
        weights.read()
    return model


def _session(
    bundle: Bundle, values: Mapping[str, ort.OrtValue], threads: int, level: ort.GraphOptimizationLevel
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # A packed copy of a weight would be used in place of the weight.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # A thread that spins between runs takes its core from the kernels.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in values.items():
        options.add_initializer(name, value)
    try:
        return ort.InferenceSession(
            os.fspath(bundle.model_path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_COPYING_OPTIMIZERS,
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{bundle.model_path}: onnxruntime refuses the graph: {error}") from error


def _fill_with_noise(weights: Weights, tensors: Iterable[TensorSpec], draw: int = 0) -> None:
    """Write noise in sizes that keep activations moderate, so that every weight matters: a fresh head is all zeros."""
    for tensor in tensors:
        view = weights[tensor.name]
        _core.generate(view, seed=0, tensor=tensor.id, draw=draw, offset=0, direction="gaussian")
        view *= np.float32(0.5 if view.ndim < 2 else 1 / np.sqrt(view.shape[0] if view.ndim == 2 else view[0].size))


def _probe_batch(bundle: Bundle) -> dict[str, NDArray[Any]]:
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


def _prove_live(model: Model, trainable: list[TensorSpec], verify: str) -> None:
    """Prove, on weights that are noise, that the session reads every trainable weight where it stands.

    A session at level DISABLE_ALL folds and packs nothing, so it is the reference: with any weight stale, the outputs
    of the two would differ by far more than their roundings do.
    """
    batch = _probe_batch(model.bundle)
    outputs = [value.name for value in model.bundle.outputs if np.dtype(value.dtype).kind == "f"]

    def results(session: ort.InferenceSession) -> NDArray[np.float64]:
        try:
            values = session.run(outputs, batch)
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise BundleError(f"{model.bundle.model_path}: a run on a probing batch failed: {error}") from error
        return np.concatenate([np.ravel(value).astype(np.float64) for value in values])

    session = model._session
    plain = _session(model.bundle, model._values, 1, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)

    def agree() -> bool:
        expected, got = results(plain), results(session)
        return bool(np.isfinite(expected).all() and np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max())

    as_one = agree()
    started = time.perf_counter()
    before = results(session)
    seconds = (time.perf_counter() - started) * len(trainable)
    if as_one and (verify == "fast" or (verify == "auto" and seconds > 2)):
        return

    dead = []
    for tensor in trainable:
        view = model.weights[tensor.name]
        _fill_with_noise(model.weights, [tensor], draw=1)
        after = results(session)
        if np.array_equal(before, after, equal_nan=True):
            # It may be live and without effect, as the bias of attention keys is: the softmax takes it out again. A
            # weight that is not a number shows wherever it is read.
            view[...] = np.nan
            if np.isnan(results(session)).sum() <= np.isnan(before).sum():
                dead.append(tensor.name)
            _fill_with_noise(model.weights, [tensor], draw=1)
        before = after
    if not as_one and not dead:
        # Each is seen somewhere, but a use of one was folded into a copy. On the stored weights all copies are right,
        # so that changing one weight at a time shows which.
        model.weights.read()
        for tensor in trainable:
            _fill_with_noise(model.weights, [tensor])
            if not agree():
                dead.append(tensor.name)
            model.weights.read()
    if dead:
        names = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
        raise DeadWeightError(
            f"{model.bundle.path}: the session does not see what is written to {names}. Prepare the model again with "
            f"`pocketzo prepare`, or leave these out of what is trainable"
        )
    if not as_one:
        raise DeadWeightError(
            f"{model.bundle.path}: the session's outputs differ from those of a session without optimisations, though "
            f"every single weight is seen"
        )
