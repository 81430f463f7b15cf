"""A model: a session and the weights that it reads, which may be written between two runs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo._core import has_fp16_arithmetic
from pocketzo.errors import BundleError, Error, MemoryLimitError, joined_lines
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.bundle_writer import copy_bundle
from pocketzo.machine.memory import megabytes, watch
from pocketzo.runtime.embeddings import embedding_rows
from pocketzo.runtime.generate import Generator, Stream
from pocketzo.runtime.halves import Halves
from pocketzo.runtime.queries import GroupLoss, check_values
from pocketzo.runtime.session import Session
from pocketzo.runtime.slices import WHOLE, Slices
from pocketzo.runtime.weights import Weights

Batch = Mapping[str, NDArray[Any]]
SMALL = 16 << 20  # bytes, an allowance for many small allocations


class Model:
    """A bundle loaded by :func:`pocketzo.load`: an onnxruntime session, and the weights that it reads.

    Attributes
    ----------
    bundle : Bundle
        The bundle that was loaded.
    weights : Weights
        Arrays by name; what is written is seen by the next run.
    threads : int
        Threads of the session.
    max_memory : int or None
        The limit that was given to :func:`load`, in bytes.
    forward_seconds : mapping of int to float
        Seconds of a forward pass by number of threads, where the number was chosen by that; else empty.
    prepacked : bool
        Whether the session multiplies by prepacked weights.
    not_prepacked_because : str or None
        Why it does not.
    slices : Slices
        How the graph computes the logits of a language model.
    group_loss : GroupLoss or None
        How the loss of some rows of a batch is computed, where `takes_queries`.
    takes_queries : bool
        Whether a run takes the values of several directions.
    halves : Halves or None
        The session, where the graph is cut.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: Weights,
        session: Session,
        *,
        threads: int,
        max_memory: int | None,
        forward_seconds: Mapping[int, float],
        not_prepacked_because: str | None,
        slices: Slices = WHOLE,
        takes_queries: bool = False,
        group_loss: GroupLoss | None = None,
        values: Mapping[str, ort.OrtValue] | None = None,
    ) -> None:
        self.bundle = bundle
        self.weights = weights  # the session uses their memory
        self.threads = threads
        self.max_memory = max_memory
        self.forward_seconds = forward_seconds
        self.init: dict[str, NDArray[Any]] = {}  # what weights began as, where the bundle has other values
        self.prepacked = not_prepacked_because is None
        self.not_prepacked_because = not_prepacked_because
        self.slices = slices
        self.takes_queries = takes_queries
        self.group_loss = group_loss
        self._values = values  # the session uses them
        self._session = session
        self.halves = session if isinstance(session, Halves) else None
        self._inputs = {value.name: value for value in bundle.inputs}
        self._outputs = [value.name for value in bundle.outputs]

    def run(
        self,
        batch: Batch,
        outputs: Iterable[str] | None = None,
        weights: Batch | None = None,
        *,
        logits_memory: int | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Parameters
        ----------
        batch : mapping of str to ndarray
            The inputs by name; arrays that are no input of the graph are ignored. Without ``labels`` there is no loss
            among the outputs.
        outputs : iterable of str, optional
            Which outputs to compute; all of them by default.
        weights : mapping of str to ndarray, optional
            Values [Q, ...] of all trained tensors, in place of those that the model has: the rows of the batch are in Q
            groups of one size. For a model that was loaded with ``queries=True``.
        logits_memory : int, optional
            Bytes, by default 32 MB, that the logits of a language model may take at a time, where the graph computes
            them in slices. More is faster, up to what the whole batch needs.

        Returns
        -------
        dict of str to ndarray
            The outputs by name. With `weights`, the loss is the mean over all groups.

        Raises
        ------
        MemoryLimitError
            The run was stopped, as this process had come close to ``max_memory``.
        ValueError
            An input is missing, or the batch has none of the graph's inputs; or `weights` are not as they should be.
        Error
            onnxruntime could not run the graph on this batch.
        """
        if weights is not None:
            if not self.takes_queries:
                raise ValueError(f"{self.bundle.path}: load the bundle with queries=True to give values of weights")
            check_values(self.bundle, weights)
        self.weights.flush()
        names = self._outputs if outputs is None else list(outputs)
        feed = {name: array for name, array in batch.items() if name in self._inputs}
        if not feed:
            raise ValueError(f"the graph's inputs are {', '.join(self._inputs)}; got {', '.join(batch) or 'none'}")
        if "labels" in self._inputs and "labels" not in feed and (outputs is None or self.bundle.loss not in names):
            # onnxruntime requires every input, also those that only the loss needs.
            names = [name for name in names if name != self.bundle.loss]
            feed["labels"] = self._any_labels(feed)
        try:
            fed = {**feed, **self.slices.feed(logits_memory)}
            return dict(zip(names, self._run(names, fed, weights or {}), strict=True))
        except (ValueError, Error):
            raise  # an own error, or an input is missing or of another type, as onnxruntime's message says
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise Error(
                f"{self.bundle.path}: the model cannot be run on this batch (is a text too long for it, or the "
                f"tokenizer that of another model?): {joined_lines(error)}"
            ) from error

    def _any_labels(self, feed: Batch) -> NDArray[Any]:
        """Return labels for a batch: zeros, of the sizes that its arrays have under the same names."""
        labels = self._inputs["labels"]
        rank = len(labels.shape)
        shapes = [array.shape for array in feed.values() if array.ndim >= rank]
        shape = list(min(shapes, key=len, default=(1,) * rank)[:rank])
        named: dict[int | str, int] = {}
        for name, array in feed.items():
            named.update(zip(self._inputs[name].shape, array.shape, strict=False))
        for axis, size in enumerate(labels.shape):
            if size != "?":
                shape[axis] = size if isinstance(size, int) else named.get(size, shape[axis])
        return np.zeros(shape, labels.dtype)

    def _run(self, names: list[str], feed: Batch, weights: Batch) -> list[NDArray[Any]]:
        given = {**feed, **weights}
        if self.max_memory is None:
            return self._session.run(names, given)
        shape = _largest(feed)
        reserve = self._reserve(feed)
        options = ort.RunOptions()
        with watch(self.max_memory - reserve, lambda: setattr(options, "terminate", True)) as readings:
            try:
                values: list[NDArray[Any]] = self._session.run(names, given, options)
            except Exception:
                if not readings:
                    raise
        if readings:
            raise MemoryLimitError(
                f"a forward pass of {' x '.join(map(str, shape))} tokens was stopped: {megabytes(readings[0])} were "
                f"in use, what it does next may take {megabytes(reserve)} more, and the limit is "
                f"{megabytes(self.max_memory)}. Take a smaller batch, prepare the model with a smaller max_length, or "
                f"allow more"
            )
        return values

    def _reserve(self, feed: Batch) -> int:
        """Return the bytes that one operator may allocate in a forward pass of a batch.

        onnxruntime stops a pass between two operators only. The largest outputs are those of the widest matrix, the
        attention's scores (as wide as that at 256 tokens, with heads of 64 and the usual four times as wide
        feed-forward), and logits: by token, or of a language model at its positions only. Twice that allows for two
        operators between two readings of memory, or for one and its buffers. It is an estimate, not a bound.
        """
        shape = _largest(feed)
        positions = feed["positions"].size if "positions" in feed else 0
        words = self._vocabulary if positions else None
        matrices = [
            tensor.shape[1] for tensor in self.bundle.tensors if len(tensor.shape) == 2 and words not in tensor.shape
        ]
        widest = max(matrices, default=1) * max(256, *shape[-1:]) // 256
        logits = [value.shape[-1] for value in self.bundle.outputs if len(value.shape) > 2]
        widest = max(widest, *(size for size in logits if isinstance(size, int)), 1)
        casts = 0
        if self.bundle.is_fp16 and not has_fp16_arithmetic():  # onnxruntime copies a weight to use it
            casts = max(4 * math.prod(tensor.shape) for tensor in self.bundle.tensors)
        logits_at_once = positions * (words or 0) // self.slices.count
        return 2 * 4 * max(math.prod(shape) * widest, logits_at_once) + casts + SMALL

    @cached_property
    def _vocabulary(self) -> int | None:
        return embedding_rows(self.bundle).get("input_ids")

    def loss(self, batch: Batch) -> float:
        """Run the graph and return its loss.

        Raises
        ------
        BundleError
            The graph has no loss, or it is not one number.
        Error
            See :meth:`run`.
        """
        if self.bundle.loss is None:
            raise BundleError(f"{self.bundle.path}: the graph has no loss output; give an objective of your own")
        loss = self.run(batch, [self.bundle.loss])[self.bundle.loss]
        if loss.size != 1:
            raise BundleError(
                f"{self.bundle.model_path}: the loss {self.bundle.loss!r} has the shape {list(loss.shape)}, expected "
                "one number; give an objective of your own"
            )
        return float(loss.item())

    @cached_property
    def generator(self) -> Generator:
        """The second session over the same weights, for generating text; see :meth:`stream`."""
        return Generator(self.bundle, self.weights, threads=self.threads, max_memory=self.max_memory)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        special_tokens: bool = True,
    ) -> Stream:
        """Continue a prompt, piece by piece, with the weights as they are now.

        The first call opens a second session over the same weights. Where they are prepacked, that session has a copy
        of them in the plain layout, which every call brings up to date: a model that was loaded with ``prepack=False``
        has one copy only.

        Parameters
        ----------
        prompt : str or sequence of int
            A text, or its tokens.
        max_tokens : int
            The most tokens that are generated.
        temperature : float
            0 takes the most probable token each time. Greater values divide the scores before a token is drawn.
        top_p : float
            In (0, 1]: a token is drawn from the most probable ones only, of at least this probability together.
        seed : int
            Of what is drawn: the same settings give the same text.
        special_tokens : bool
            Whether the tokenizer adds its special tokens to the prompt: not to that of
            :func:`pocketzo.chat_text`, which has them.

        Returns
        -------
        Stream
            An iterator of str, which also knows the tokens, and why the text ended. The weights must not change before.

        Raises
        ------
        BundleError
            The bundle has no ``generate.onnx``, or it is no decoder's.
        DataError
            The bundle has no tokenizer.
        MemoryLimitError
            ``max_memory`` leaves no room for the copy.
        TypeError, ValueError
            A setting is out of range, or the prompt has no tokens, or more than the model reads.
        """
        return self.generator.stream(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            special_tokens=special_tokens,
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        special_tokens: bool = True,
    ) -> str:
        """Continue a prompt, and return the text that follows it; see :meth:`stream`."""
        return "".join(
            self.stream(
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                special_tokens=special_tokens,
            )
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a bundle with the current weights.

        Parameters
        ----------
        path : path-like
            The folder to write.
        overwrite : bool
            Whether a bundle at ``path`` is replaced, when the new one is complete. Never replaced are the bundle that
            this model was loaded from, and a folder that holds anything besides a bundle's files.

        Raises
        ------
        BundleError
            ``path`` exists and may not be replaced.
        """
        copy_bundle(self.bundle, path, self.weights.save, overwrite=overwrite)


def _largest(feed: Batch) -> tuple[int, ...]:
    """Return examples x tokens, or the shape of the largest input of a model that takes no tokens."""
    tokens = feed.get("input_ids")
    return max((array.shape for array in feed.values()), key=math.prod) if tokens is None else tokens.shape
