"""A model that runs and whose weights can be written while it does."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo._core import has_fp16_arithmetic
from pocketzo.errors import BundleError, Error, MemoryLimitError
from pocketzo.formats.bundle import Bundle
from pocketzo.machine.memory import watch
from pocketzo.runtime.weights import Weights

Batch = Mapping[str, NDArray[Any]]
SMALL = 16 << 20  # bytes that are in use for many small things


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
    prepacked : bool
        Whether the session multiplies by prepacked weights.
    not_prepacked_because : str or None
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
        not_prepacked_because: str | None,
    ) -> None:
        self.bundle = bundle
        self.weights = weights
        self.threads = threads
        self.forward_seconds: Mapping[int, float] = {}
        self.prepacked = not_prepacked_because is None
        self.not_prepacked_because = not_prepacked_because
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
        self.weights.flush()
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
                f"a forward pass of {' x '.join(map(str, shape))} tokens was broken off: {megabytes(readings[0])} were "
                f"in use, what it does next may take {megabytes(reserve)} more, and the limit is "
                f"{megabytes(self.max_memory)}. Take a smaller batch, prepare the model with a smaller max_length, or "
                f"allow more"
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
        if self.bundle.is_fp16 and not has_fp16_arithmetic():  # the runtime copies a weight to use it
            casts = max(4 * math.prod(tensor.shape) for tensor in self.bundle.tensors)
        return 2 * 4 * math.prod(shape) * widest + casts + SMALL

    def loss(self, batch: Batch) -> float:
        """Run the graph and return its loss."""
        if self.bundle.loss is None:
            raise BundleError(f"{self.bundle.path}: the graph has no loss output; give an objective of your own")
        return float(self.run(batch, [self.bundle.loss])[self.bundle.loss])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a bundle with the weights as they are now."""
        self.bundle.copy_to(Path(path), self.weights.save)


def megabytes(count: int) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e6:,.0f} MB"
