"""Inputs of decoders that hold the past of a text, and what they are where a text begins."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import ValueSpec

KEPT: Final = ("num_logits_to_keep", "logits_to_keep")
"""Inputs that say of how many tokens, the last ones, there are logits; 0 means all. transformers has renamed it."""
FLAGS: Final = ("use_cache_branch", *KEPT)
"""Inputs that are 0 where a text begins: no cache is used, and the logits of all tokens are kept."""


def is_cache_name(name: str) -> bool:
    """Whether an input of more than two axes is a cache, as exporters name them."""
    return re.match("past|cache", name, re.IGNORECASE) is not None


def is_cache(spec: ValueSpec) -> bool:
    """Whether an input holds keys, values or states of past tokens."""
    return is_cache_name(spec.name) and len(spec.shape) > 2


def is_flag(spec: ValueSpec) -> bool:
    """Whether an input is one number for all examples that is 0 where a text begins."""
    return spec.name in FLAGS and all(size == 1 for size in spec.shape)


def at_beginning(spec: ValueSpec, examples: int) -> NDArray[Any] | None:
    """Return what an input is for texts from their beginning: a cache of length 0, or a flag of 0.

    None for all other inputs, and for caches of fixed size or of an encoder, which are never empty.
    """
    if is_flag(spec):
        return np.zeros(spec.shape, spec.dtype)  # type: ignore[arg-type]
    if not is_cache(spec) or "encoder" in spec.name or all(isinstance(size, int) for size in spec.shape[1:]):
        return None
    sizes = [size if isinstance(size, int) else 0 for size in spec.shape[1:]]
    first = spec.shape[0] if isinstance(spec.shape[0], int) else examples
    return np.zeros([first, *sizes], spec.dtype)
