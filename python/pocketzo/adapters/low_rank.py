"""LoRA by the modules of a checkpoint: W' = W + (alpha / r) B A, A [r, in], B [out, r], as other libraries have it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocketzo.adapters.checkpoint import Checkpoint
from pocketzo.adapters.modules import Target, target_of
from pocketzo.adapters.tuned import Tuned
from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec


@dataclass(frozen=True)
class LowRank:
    """The matrices of a module.

    Attributes
    ----------
    a, b : ndarray, float32
        [r, in] and [out, r].
    scale : float
        alpha / r.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.a)

    @property
    def alpha(self) -> float:
        """The product of scale and rank, an integer if it is one."""
        alpha = self.scale * self.rank
        return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha

    def scaled(self, scale: float) -> LowRank:
        """Return the same product with another scale."""
        return self if scale == self.scale else LowRank(self.a, self.b * np.float32(self.scale / scale), scale)


def check_alone(tuned: Tuned, added: Iterable[AddedSpec], kinds: tuple[str, ...], holds: str) -> None:
    """Refuse what an adapter cannot hold.

    Raises
    ------
    BundleError
        Names the set, and what to do.
    """
    other = next((item for item in added if item.kind not in kinds), None)
    if other is not None:
        raise BundleError(
            f"{tuned.bundle.path}: {other.part!r} does not fit into {holds}: take --format onnx, or a run of lora alone"
        )
    if tuned.own:
        raise BundleError(
            f"{tuned.bundle.path}: {tuned.own[0]!r} is trained beside what was added, and does not fit into {holds}: "
            "'pocketzo merge' keeps it"
        )


def by_module(tuned: Tuned, added: Iterable[AddedSpec], checkpoint: Checkpoint) -> dict[str, LowRank]:
    """Return the matrices of each module.

    Parts of a module that have matrices of their own, such as the queries and the values of one projection, become one
    pair: ranks add up, and rows of B are 0 where another part's are not.

    Raises
    ------
    BundleError
        See :func:`target_of`.
    """
    parts: defaultdict[str, list[tuple[Target, LowRank]]] = defaultdict(list)
    for item in added:
        assert item.alpha is not None, "LoRA has one"
        down, up = (tuned.float32(name).T for name in item.tensors)
        target = target_of(item, checkpoint)
        parts[target.module].append((target, LowRank(down, up, item.alpha / len(down))))
    return {module: _joined(found) for module, found in parts.items()}


def _joined(parts: list[tuple[Target, LowRank]]) -> LowRank:
    scale = parts[0][1].scale
    size = max(target.size for target, _ in parts)
    b = np.zeros((size, sum(one.rank for _, one in parts)), np.float32)
    at = 0
    for target, one in parts:
        b[target.start : target.start + target.count, at : at + one.rank] = one.scaled(scale).b
        at += one.rank
    return LowRank(np.ascontiguousarray(np.concatenate([one.a for _, one in parts])), b, scale)
