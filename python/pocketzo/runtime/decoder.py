"""A language model that reads one text token by token, with caches of what it has read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError, Error, first_line
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.past import KEPT
from pocketzo.runtime.embeddings import context_length, embedding_rows
from pocketzo.runtime.image import Image

_DTYPES: Final = {
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
Caches = Mapping[str, ort.OrtValue]
_LOGITS: Final = 32 << 20  # bytes of scores that a run may return: most graphs return those of every token
_IDS, _MASK, _POSITIONS, _BRANCH = "input_ids", "attention_mask", "position_ids", "use_cache_branch"
_TYPES = "token_type_ids"


@dataclass(frozen=True)
class _Cache:
    """What is kept of the tokens before: an output of one run that is an input of the next."""

    past: str
    present: str
    empty: ort.OrtValue


class Decoder:
    """``generate.onnx`` in a session.

    Parameters
    ----------
    bundle : Bundle
        A bundle with ``generate.onnx``.
    session : InferenceSession
        Of that graph.
    image : Image, optional
        Memory that the session reads, and so is kept.

    Attributes
    ----------
    cached : bool
        Whether the graph has caches. Without them, all tokens are read again for each new one.
    vocabulary : int
        The number of token ids that it can read; 2^31 if it is unknown.
    chunk : int
        The most tokens that one run should read.
    empty : mapping of str to OrtValue
        The caches before the first token.
    context : int or None
        The most tokens that it can read; None if the graph sets no limit that is known.

    Raises
    ------
    BundleError
        The graph has an input that no language model is known to have, or a cache that does not fit to its outputs.
    """

    def __init__(self, bundle: Bundle, session: ort.InferenceSession, image: Image | None = None) -> None:
        self._path = bundle.generate_path
        self._session = session
        self._image = image
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._caches = tuple(self._cache(value) for value in self._inputs.values() if value.name.startswith("past"))
        self._check_inputs()
        presents = {cache.present for cache in self._caches}
        self._logits = "logits" if "logits" in self._outputs else next(n for n in self._outputs if n not in presents)
        self.cached = bool(self._caches)
        self.vocabulary = embedding_rows(bundle, bundle.generate_path).get(_IDS, 2**31)
        self.context = context_length(bundle, bundle.generate_path)
        self.chunk = self._most_tokens()
        self.empty: Caches = {cache.past: cache.empty for cache in self._caches}

    def begin(self) -> Reading:
        """Return the state of a text of which nothing was read."""
        return Reading(self)

    def run(self, tokens: list[int], total: int, past: Caches) -> tuple[NDArray[Any], Caches]:
        """Run the graph on the last tokens of ``total``.

        Returns
        -------
        scores : ndarray of float32 or float16, shape [vocabulary]
            Of the token that follows.
        past : mapping of str to OrtValue
            For the next run.
        """
        row = np.array(tokens)[None]
        before = total - len(tokens)
        values = {_IDS: row, _MASK: np.ones((1, total)), _POSITIONS: np.arange(before, total)[None]}
        feed = {name: self._value(name, row, values) for name in self._inputs if name not in past}
        if _BRANCH in self._inputs:
            feed[_BRANCH] = _ort_value(np.array([before > 0]))
        names = [self._logits, *(cache.present for cache in self._caches)]
        try:
            scores, *presents = self._session.run_with_ort_values(names, {**feed, **past})
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise Error(
                f"{self._path}: the model cannot be run on {total} tokens (is that more than it was made for?): "
                f"{first_line(error)}"
            ) from error
        kept = {cache.past: present for cache, present in zip(self._caches, presents, strict=True)}
        return scores.numpy().reshape(-1, scores.shape()[-1])[-1], kept

    def _value(self, name: str, row: NDArray[Any], values: dict[str, NDArray[Any]]) -> ort.OrtValue:
        """Return the value of an input that is no cache."""
        declared = self._inputs[name]
        dtype = _DTYPES[declared.type]
        if name in KEPT:
            return _ort_value(np.ones([1] * len(declared.shape), dtype))
        array = np.zeros_like(row) if name not in values else values[name]
        if len(declared.shape) == 3:  # positions of text, images and videos, equal where there is text alone
            array = np.broadcast_to(array, (declared.shape[0], *array.shape))
        return _ort_value(np.ascontiguousarray(array, dtype))

    def _cache(self, value: Any) -> _Cache:
        """Find the output that continues an input, and the size of the input before the first token."""
        names = [re.sub("^past(_key_values)?", "present", value.name), value.name.replace("past", "present")]
        present = next((name for name in names if name in self._outputs), None)
        if present is None:
            raise BundleError(f"{self._path}: no output continues the cache {value.name!r}; expected {names[0]!r}")
        shape = [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
        if shape.count(0) != 1 or value.type not in _DTYPES:
            raise BundleError(
                f"{self._path}: the cache {value.name!r} is {value.type} {value.shape}; expected one size, that of the "
                "tokens, to be open beside the batch's: export the model with fixed numbers of heads"
            )
        return _Cache(value.name, present, _ort_value(np.zeros(shape, _DTYPES[value.type])))

    def _check_inputs(self) -> None:
        known = {_IDS, _MASK, _POSITIONS, _BRANCH, *KEPT, _TYPES, *(cache.past for cache in self._caches)}
        for name, value in self._inputs.items():
            if name not in known or value.type not in _DTYPES:
                raise BundleError(
                    f"{self._path}: input {name!r} of type {value.type} is not known; expected a decoder's: "
                    f"{', '.join(sorted(known))}"
                )
        if _IDS not in self._inputs:
            raise BundleError(f"{self._path}: the graph has no input {_IDS!r}: it is no decoder")
        for name in (_IDS, _MASK):
            shape = self._inputs[name].shape if name in self._inputs else ["batch", "sequence"]
            if len(shape) != 2 or isinstance(shape[1], int) or (isinstance(shape[0], int) and shape[0] != 1):
                raise BundleError(
                    f"{self._path}: input {name!r} has shape {shape}; expected [batch, tokens], both open: export the "
                    "model with dynamic axes"
                )

    def _most_tokens(self) -> int:
        """Return how many tokens a run may read: fewer where a run returns the scores of each."""
        if not self.cached or _BRANCH in self._inputs or not self._inputs.keys().isdisjoint(KEPT):
            # A merged export's branch with caches may have been traced with one token.
            return 2**31
        output = next(value for value in self._session.get_outputs() if value.name == self._logits)
        width = output.shape[-1] if isinstance(output.shape[-1], int) else 1 << 16
        return max(1, _LOGITS // (4 * width))


class Reading:
    """A text as far as a decoder has read it, with the caches of its tokens."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._past = decoder.empty
        self._read: list[int] = []

    def logits(self, tokens: Sequence[int]) -> NDArray[Any]:
        """Read tokens that follow those that were read, and return the scores of the next.

        Parameters
        ----------
        tokens : sequence of int
            At least one.

        Returns
        -------
        ndarray of float32 or float16, shape [vocabulary]

        Raises
        ------
        Error
            onnxruntime cannot run the graph on so many tokens.
        """
        scores = np.empty(0, np.float32)
        for at in range(0, len(tokens), self._decoder.chunk):
            part = list(tokens[at : at + self._decoder.chunk])
            self._read += part
            unread = part if self._decoder.cached else self._read
            scores, self._past = self._decoder.run(unread, len(self._read), self._past)
        return scores


def _ort_value(array: NDArray[Any]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)
