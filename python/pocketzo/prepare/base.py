"""Quantise the frozen weights of a float export before it is prepared."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pocketzo.errors import BundleError
from pocketzo.formats.staging import scratch_folder
from pocketzo.graph.blocks import Scheme
from pocketzo.trainable.spec import Choice, Part

_KEPT = ("bias", "norm")
"""The kinds of sets of weights that stay floats."""


def check_base(base: str, parts: Sequence[Part], dtype: str | None) -> Scheme:
    """Return how the base is to be quantised.

    Raises
    ------
    ValueError
        It is not known, or does not go with what is trained or with a type.
    """
    try:
        scheme = Scheme.parse(base)
    except ValueError as error:
        raise ValueError(f"base: {error}") from None
    if dtype is not None:
        raise ValueError(f"base={base!r} and dtype={dtype!r} exclude each other: what is not quantised keeps its type")
    for part in parts:
        if isinstance(part, Choice) and part.kind not in _KEPT:
            raise ValueError(
                f"base={base!r} quantises the model's matrices, which then cannot be trained, as train={part.text!r} "
                "would: train a set that is added, such as 'lora', or 'norm' or 'bias'"
            )
    return scheme


@contextmanager
def quantised(source: Path, scheme: Scheme, parent: Path, note: Callable[[str], None] | None) -> Iterator[Path]:
    """Yield an ONNX file with the matrices of another one in blocks, in a temporary folder in ``parent``.

    Raises
    ------
    BundleError
        The file cannot be read, or has no float32 matrix that a product or an embedding reads.
    """
    from pocketzo.graph.matrices import Matrices
    from pocketzo.graph.nbits import quantise
    from pocketzo.graph.stored import store

    with scratch_folder(parent) as folder:
        floats, target = folder / "floats" / source.name, folder / "blocks" / source.name
        floats.parent.mkdir()
        target.parent.mkdir()
        store(source, floats)  # under readable names, each once
        summary = quantise(floats, target, Matrices(scheme))
        if not summary.requantised:
            raise BundleError(
                "there is nothing to quantise: no product or embedding reads a float32 matrix of 32 columns or more. "
                "Export the model in float32, or leave out the base"
            )
        shutil.rmtree(floats.parent)
        if note is not None:
            for line in summary.lines():
                note(f"base: {line}")
        yield target
