"""Tokens in front of a text: what a decoder computes of them, and of texts behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import ORDER_ID, ValueSpec
from pocketzo.formats.past import at_beginning, is_cache
from pocketzo.formats.probe import Probe
from pocketzo.graph.decoder import MASK, TOKENS
from pocketzo.kernels import noise

Array = NDArray[Any]
_POSITIONS: Final = "position_ids"
_DRAW: Final = 2**64 - 1


def draw_tokens(session: ort.InferenceSession, inputs: Sequence[ValueSpec], count: int) -> tuple[int, ...]:
    """Return tokens of a decoder's vocabulary, all different: those of the smallest noise."""
    logits = session.run(["logits"], _feed(inputs, (0,)))[0]
    vocabulary = logits.shape[-1]
    if count > vocabulary:
        raise BundleError(f"a prefix of {count} tokens, and the vocabulary has {vocabulary}: expected no more")
    z = noise(vocabulary, seed=0, tensor=ORDER_ID, draw=_DRAW)
    return tuple(int(token) for token in np.argsort(z, kind="stable")[:count])


def caches_of(session: ort.InferenceSession, inputs: Sequence[ValueSpec], tokens: tuple[int, ...]) -> dict[str, Array]:
    """Return the keys and values of tokens, float32 [heads, tokens, size], by the names of the caches."""
    names = [value.name for value in session.get_outputs() if value.name.startswith("present")]
    caches = [value.name for value in inputs if is_cache(value)]
    values = session.run(names, _feed(inputs, tokens))
    return {cache: np.asarray(value[0], np.float32) for cache, value in zip(caches, values, strict=True)}


def _feed(inputs: Sequence[ValueSpec], tokens: tuple[int, ...]) -> Probe:
    feed: Probe = {}
    for value in inputs:
        start = at_beginning(value, 1)
        if value.name == TOKENS:
            feed[value.name] = np.array([tokens], value.dtype)
        elif value.name == MASK:
            feed[value.name] = np.ones((1, len(tokens)), value.dtype)
        elif value.name == _POSITIONS:
            sizes = [size if isinstance(size, int) else 1 for size in value.shape[:-1]]
            feed[value.name] = np.broadcast_to(np.arange(len(tokens), dtype=value.dtype), (*sizes, len(tokens)))
        elif start is not None:
            feed[value.name] = start
        else:
            raise BundleError(f"a prefix begins as real tokens, and the decoder has an input {value.name!r}, too")
    return feed


def put_in_front(batch: Mapping[str, Array], tokens: tuple[int, ...]) -> Probe:
    """Return a batch with tokens in front of each text."""
    count = len(tokens)
    found = dict(batch)
    rows = len(batch[TOKENS])
    found[TOKENS] = np.concatenate([np.tile(np.array(tokens, batch[TOKENS].dtype), (rows, 1)), batch[TOKENS]], axis=1)
    if MASK in batch:
        found[MASK] = np.concatenate([np.ones((rows, count), batch[MASK].dtype), batch[MASK]], axis=1)
    if _POSITIONS in batch:
        old = batch[_POSITIONS]
        first = np.broadcast_to(np.arange(count, dtype=old.dtype), (*old.shape[:-1], count))
        found[_POSITIONS] = np.concatenate([first, old + count], axis=-1)
    return found


def cut_front(values: Mapping[str, Array], count: int) -> dict[str, Array]:
    """Return logits and caches of texts without those of tokens in front."""
    return {
        name: value[:, :, count:] if name.startswith("present") else value[:, count:] for name, value in values.items()
    }
