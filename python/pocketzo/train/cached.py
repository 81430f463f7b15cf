"""Training behind a cut: whether it pays, what it takes, and the cache that is filled before the first step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.dataset import Dataset, fixed_batch
from pocketzo.formats.activations import Dtype, Layout
from pocketzo.formats.bundle import Bundle
from pocketzo.machine.memory import megabytes
from pocketzo.optim.groups import select
from pocketzo.runtime.activations import LIMIT, ActivationCache, default_folder, layout_of
from pocketzo.runtime.cut import Cut, plan_cut
from pocketzo.runtime.load import load
from pocketzo.runtime.model import Batch, Model
from pocketzo.tasks.parts import count_rows, parts
from pocketzo.tasks.registry import task_of
from pocketzo.train.recipe import Recipe

WORTHWHILE: Final = 0.3
"""The share of a forward pass that must be saved for a cache to be made without being asked for."""

_LEAST_WORK: Final = 3e11  # multiply-adds, some ten seconds of a core: below it a cache is not worth its files
_MOST_OF_DISK: Final = 0.5  # of what is free
_FILL: Final = 32  # examples
_EXAMPLE: Final = 104  # bytes of an entry beside its values: its line of the table, and half of the alignment

Told = Callable[[int, int, float, float | None], None]
"""Called with how many examples are done, how many there are, how many seconds the rest may take, and how many the
front takes for all examples, by those of which it was run; None if there are none yet."""


@dataclass(frozen=True)
class Plan:
    """What training behind a cut would take and save.

    Attributes
    ----------
    cut : Cut
    folder : Path
        Of the cache.
    layout : Layout
    limit : int
        Bytes of the whole cache.
    saved : float
        Share of a forward pass, in multiply-adds.
    nbytes : int
        Of the values of all examples.
    work : float
        Multiply-adds that the run is spared, without those that fill the cache.
    """

    cut: Cut
    folder: Path
    layout: Layout
    limit: int
    saved: float
    nbytes: int
    work: float

    @property
    def pays(self) -> bool:
        """Whether a cache should be made without being asked for."""
        return self.saved >= WORTHWHILE and self.work >= _LEAST_WORK and not self.lacks()

    def lacks(self) -> str | None:
        """Return why the values of all examples do not fit; None if they do."""
        if self.nbytes > self.limit:
            return f"they take {megabytes(self.nbytes)}, and the limit is {megabytes(self.limit)} (--cache-limit)"
        existing = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if self.nbytes > _MOST_OF_DISK * free:
            return f"they take {megabytes(self.nbytes)}, and {existing} has {megabytes(free)} free"
        return None


def plan(
    bundle: Bundle,
    trainable: str | None,
    data: Dataset,
    others: Sequence[Dataset] = (),
    *,
    forwards: int,
    folder: Path | None = None,
    dtype: Dtype = "fp32",
    limit: int = LIMIT,
    least: float = 0.0,
) -> Plan:
    """Plan training behind a cut.

    Parameters
    ----------
    bundle : Bundle
    trainable : str or None
        As for an optimizer.
    data : Dataset
        The training data.
    others : sequence of Dataset
        Other data on which the model is run.
    forwards : int
        How many examples are run in all, each time counted.
    folder : Path, optional
        Of the cache; by default that of the user.
    dtype : {"fp32", "fp16", "int8"}
    limit : int
        Bytes of the whole cache.
    least : float
        As for :func:`plan_cut`.

    Raises
    ------
    NotCuttableError
        There is nothing to keep, or it cannot be kept.
    """
    cut = plan_cut(bundle, {tensor.name for tensor in select(bundle, trainable)}, least=least)
    lengths = np.concatenate([_row_lengths(one) for one in (data, *others)])
    first = data.batch(np.arange(min(len(data), fixed_batch(bundle) or _FILL)))
    rows = count_rows(bundle, first)
    positions = first["positions"].size / rows if "positions" in first else 1.0
    mean = float(_row_lengths(data).mean())
    whole, back = cut.work(1, mean, positions)
    layout = layout_of(cut, dtype)
    sizes = {length: layout.nbytes(length) for length in np.unique(lengths).tolist()}
    nbytes = sum(sizes[length] + _EXAMPLE for length in lengths.tolist())
    per_example = rows / len(first.examples)
    return Plan(
        cut=cut,
        folder=folder or default_folder(),
        layout=layout,
        limit=limit,
        saved=1 - back / whole,
        nbytes=nbytes,
        work=(whole - back) * (forwards * per_example - len(lengths)),
    )


def _row_lengths(data: Dataset) -> NDArray[np.int64]:
    return np.ones(len(data), np.int64) if data.row_lengths is None else data.row_lengths.astype(np.int64)


def open_cache(model: Model, folder: Path, layout: Layout, limit: int = LIMIT) -> ActivationCache:
    """Have a model that is cut keep values in a folder."""
    assert model.halves is not None
    cache = ActivationCache(folder, layout, limit)
    model.halves.store = cache
    return cache


class Filled(NamedTuple):
    """What filling a cache has taken.

    Attributes
    ----------
    rows : int
        Of which the front was run.
    seconds : float or None
        That the front takes for all examples, by those of which it was run; None if all were kept already.
    """

    rows: int
    seconds: float | None


def fill(model: Model, data: Dataset, told: Told | None = None, activation_memory: int | None = None) -> Filled:
    """Run the front for all examples of which nothing is kept yet, and close its session.

    Parameters
    ----------
    model : Model
        Loaded with a cut.
    data : Dataset
    told : callable, optional
    activation_memory : int, optional
        As for :func:`pocketzo.tasks.parts.parts`.
    """
    halves = model.halves
    assert halves is not None
    lengths = np.ones(len(data), np.int64) if data.lengths is None else data.lengths.astype(np.int64)
    before, before_seconds, began = halves.computed, halves.seconds, time.perf_counter()
    done, tokens, run_tokens, total = 0, 0, 0.0, int(lengths.sum())

    def front() -> float | None:
        return (halves.seconds - before_seconds) * total / run_tokens if run_tokens else None

    for chosen in _batches(lengths, fixed_batch(model.bundle) or _FILL):
        batch: Batch = data.batch(chosen)
        computed, rows = halves.computed, count_rows(model.bundle, batch)
        for part in parts(task_of(model.bundle), batch, activation_memory):
            halves.fill({name: array for name, array in part.batch.items() if name != "row_examples"})
        own = int(lengths[chosen].sum())
        done, tokens = done + len(chosen), tokens + own
        run_tokens += own * (halves.computed - computed) / rows
        if told is not None:
            told(done, len(data), (time.perf_counter() - began) * (total - tokens) / tokens, front())
    halves.store.flush()
    halves.release()
    return Filled(halves.computed - before, front())


def _batches(lengths: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of all examples in batches of similar length, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def described(model: Model) -> dict[str, Any]:
    """Return what the header of a run records of a model's cache."""
    if model.halves is None:
        return {}
    store = model.halves.store
    if isinstance(store, ActivationCache):
        return {"cache": store.dtype, "cache_folder": str(store.folder.absolute())}
    return {"cache": "fp32"}


def cut_as(bundle: Bundle, recipe: Recipe) -> tuple[Cut | None, tuple[Path, Layout] | None]:
    """Return where the model of a run is cut, and the folder and the layout of its cache; None for what it has not."""
    session = recipe.session
    if session.cache is None:
        return None, None
    cut = plan_cut(bundle, recipe.method["trained"])
    if session.cache_folder is None:
        return cut, None
    return cut, (Path(session.cache_folder), layout_of(cut, cast("Dtype", session.cache)))


def load_as(bundle: Bundle, recipe: Recipe, *, threads: int | None = None, max_memory: int | None = None) -> Model:
    """Load the base of a run as the run did, and open its cache."""
    session = recipe.session
    cut, opened = cut_as(bundle, recipe)
    model = load(
        bundle,
        threads=session.threads if threads is None else threads,
        prepack=session.prepack,
        max_memory=max_memory,
        queries=recipe.takes_queries,
        cut=cut,
    )
    if opened is not None:
        open_cache(model, *opened)
    return model
