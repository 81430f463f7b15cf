"""The activation cache on the command line: how `pocketzo train` uses it, and ``pocketzo cache``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import click

from pocketzo.cli.command import Command, Commands
from pocketzo.cli.console import duration, err, note, out, quoted, say, size_text
from pocketzo.cli.options import PATH
from pocketzo.data.dataset import Dataset
from pocketzo.errors import CacheError, Error, NotCuttableError
from pocketzo.formats.activations import Dtype, Layout
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.activations import LIMIT, clear, default_folder, segments
from pocketzo.runtime.cut import Cut
from pocketzo.runtime.model import Model
from pocketzo.train.cached import WORTHWHILE, cut_as, fill, open_cache, plan
from pocketzo.train.run import Run


@dataclass
class RunCache:
    """The cache of one `pocketzo train`.

    Attributes
    ----------
    where : str
        ``--cache``.
    dtype : {"fp32", "fp16", "int8"} or None
    limit : int or None
    saved : float
        The share of a forward pass that is not run again, in multiply-adds, after :meth:`plan`.
    """

    where: str
    dtype: Dtype | None
    limit: int | None
    saved: float = field(default=0.0, init=False)
    _opened: tuple[Path, Layout] | None = field(default=None, init=False)
    _later: int = field(default=0, init=False)  # forward passes of an example that find it kept

    def plan(
        self,
        bundle: Bundle,
        trainable: str | None,
        data: Dataset,
        held_out: Dataset | None,
        *,
        steps: int,
        evaluations: int,
    ) -> Cut | None:
        """Return where to cut a new run's model, after saying what that saves; None without a cache.

        Parameters
        ----------
        bundle : Bundle
        trainable : str or None
        data : Dataset
        held_out : Dataset or None
        steps : int
            Examples that all steps run, each time counted.
        evaluations : int
            Of the held-out data.
        """
        if self.where == "off":
            if self.dtype is not None or self.limit is not None:
                raise click.UsageError("--cache-dtype and --cache-limit are of a cache: leave --cache off out")
            return None
        asked = self.where != "auto"
        others = [] if held_out is None else [held_out]
        forwards = steps + evaluations * sum(map(len, others))
        try:
            planned = plan(
                bundle,
                trainable,
                data,
                others,
                forwards=forwards,
                folder=Path(self.where) if asked else None,
                dtype=self.dtype or "fp32",
                limit=self.limit or LIMIT,
                least=0.0 if asked else WORTHWHILE / 2,  # few of the logits may be computed, which counts them fully
            )
        except NotCuttableError:
            if asked:
                raise
            return None
        lacks = planned.lacks()
        share = f"{planned.saved:.0%} of a forward pass come before what is trained"
        if asked and lacks:
            raise CacheError(f"{planned.folder}: the activations do not fit: {lacks}")
        if not asked and not planned.pays:
            if lacks and planned.saved >= WORTHWHILE:
                note(f"{share}; their results are not kept: {lacks}")
            return None
        note(
            f"{share}: they are run once for each example, and kept as {planned.layout.dtype}: "
            f"{size_text(planned.nbytes)} in {planned.folder}"
        )
        self._opened = planned.folder, planned.layout
        self.saved = planned.saved
        self._later = max(0, forwards - len(data) - sum(map(len, others)))
        return planned.cut

    def as_before(self, past: Run, bundle: Bundle) -> Cut | None:
        """Return where a run's model is cut."""
        cut, self._opened = cut_as(bundle, past.recipe)
        return cut

    def differences(self, past: Run) -> list[str]:
        """Return the settings that were given and are not those of a run, which goes on with its own."""
        session = past.recipe.session
        found = []
        if self.where != "auto":
            here = None if self.where == "off" else str(Path(self.where).absolute())
            if here != session.cache_folder:
                found.append(f"cache is {session.cache_folder or 'off'} there and {here or 'off'} here")
        if self.dtype is not None and self.dtype != session.cache:
            found.append(f"cache_dtype is {session.cache} there and {self.dtype} here")
        return found

    def fill(self, model: Model, data: Dataset, activation_memory: int | None) -> None:
        """Open the cache, and compute what it does not hold yet of the training data."""
        if model.halves is None or self._opened is None:
            return
        cache = open_cache(model, *self._opened, self.limit or LIMIT)
        held = len(cache)
        predicted = False
        with err.status("filling the cache") as status:

            def told(done: int, count: int, left: float, front: float | None) -> None:
                nonlocal predicted
                if front is not None and done < count and not predicted:
                    predicted = True
                    spared = duration(self._later * front / count)
                    note(f"filling the cache will take about {duration(left)}, and spare the run about {spared}")
                status.update(f"filling the cache: {done:,} of {count:,} examples, {duration(left)} left")

            filled = fill(model, data, told, activation_memory)
        if cache.error is not None and self.where != "auto":
            raise Error(f"{cache.error}: the activations could not be kept: choose another --cache, or off")
        found = f"{filled.rows:,} rows computed"
        if held:
            found = f"{held:,} rows were kept before, {filled.rows:,} were computed"
        if filled.seconds is not None:
            each = filled.seconds / len(data)
            found += (
                f"; {1e3 * each:.3g} ms an example, which {self._later:,} later forward passes of an example are "
                f"spared: {duration(self._later * each)}"
            )
        note(f"{cache.folder}: {found}")


@click.group(cls=Commands)
def cache() -> None:
    """Show or clear the activation cache of `pocketzo train`.

    It holds what models compute from training examples, from which texts may be guessed.

    \b
    Examples:
      pocketzo cache info
      pocketzo cache clear
    """


_folder = click.option("--dir", "folder", type=PATH, metavar="DIR", help="The cache.  [default: that of the user]")


@cache.command(cls=Command)
@_folder
def info(folder: Path | None) -> None:
    """Print where the cache is, and how much it holds."""
    folder = folder or default_folder()
    found = segments(folder)
    total = sum(state.st_size for _, state in found)
    out.print(f"{folder}: {size_text(total)} in {len(found)} files", soft_wrap=True)


@cache.command("clear", cls=Command)
@_folder
def clear_all(folder: Path | None) -> None:
    """Remove all activations. Runs go on without: they compute them anew."""
    folder = folder or default_folder()
    count, total = clear(folder)
    say(f"{quoted(folder)}: removed {count} files, {size_text(total)}")
