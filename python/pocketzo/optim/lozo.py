"""LOZO: MeZO along directions of low rank, part of which stays for many steps."""

from __future__ import annotations

from typing import Any, ClassVar

from pocketzo._core import MAX_RANK
from pocketzo.arguments import check_integer
from pocketzo.optim.groups import Tunable
from pocketzo.optim.mezo import MeZO
from pocketzo.optim.program import Program


class LOZO(MeZO):
    """LOZO (Chen et al., arXiv 2410.07698): MeZO's estimate along ``z = U V^T / sqrt(rank)`` for every matrix.

    U [rows, rank] is drawn for each direction, V [columns, rank] for ``interval`` steps, so that these move a matrix in
    a subspace only. Both are regenerated from the draws (cpp/SPEC.md, section 7) and never stored. Elements of z have
    variance 1, as MeZO's. The estimate is the paper's, which moves by ``slope U V^T / rank`` for perturbations by
    ``eps U V^T``, with its eps divided by ``sqrt(rank)``. Tensors of fewer than two dimensions get ordinary directions.

    Rank 2 and interval 50 are what the authors' code runs OPT-13B with; they searched ranks 1 and 2 and intervals 50
    and 100 there, and took rank 4 and interval 100 for RoBERTa-large.

    Parameters
    ----------
    model : Model
        Its trainable weights are updated in place.
    rank : int
        Of U and V, in 1 .. 16. More than a matrix has rows or columns is allowed, and useless.
    interval : int
        A V is for the directions of so many steps: for ``interval * queries`` draws. With a pace, steps take more
        draws, and in a federation each client does.
    **settings
        Those of :class:`Optimizer`, but for ``candidates``; by default a step uses one Gaussian direction. With
        Rademacher ones, the elements of U and V are +-1.
    """

    method: ClassVar[str] = "lozo"
    default_rank: ClassVar[int] = 2
    default_interval: ClassVar[int] = 50

    def __init__(
        self, model: Tunable, *, rank: int = default_rank, interval: int = default_interval, **settings: Any
    ) -> None:
        check_integer("rank", rank, 1, MAX_RANK)
        check_integer("interval", interval, 1)
        if settings.get("candidates") is not None:
            raise ValueError("candidates are not for lozo: they are compared as directions without a rank. Take mezo")
        self.rank = rank
        self.interval = interval
        super().__init__(model, **settings)

    def settings(self) -> dict[str, Any]:
        """See :meth:`Optimizer.settings`."""
        return {**super().settings(), "rank": int(self.rank), "interval": int(self.interval)}

    def _pack(self, program: Program) -> bytes:
        rademacher = self.distribution == "rademacher"
        return program.pack(self.seed, rademacher=rademacher, rank=self.rank, period=self.interval * self.queries)
