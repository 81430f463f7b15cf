"""Resuming a run from its folder: the journal holds the paths of the bundle and the data."""

from __future__ import annotations

import os
from pathlib import Path

from pocketzo import kernels
from pocketzo.data.load import load_dataset
from pocketzo.errors import JournalError
from pocketzo.formats.bundle import Bundle
from pocketzo.train.cached import load_as
from pocketzo.train.recipe import Session
from pocketzo.train.run import Run
from pocketzo.train.trainer import Trainer


def resume(
    run: str | os.PathLike[str],
    *,
    bundle: Path | None = None,
    train: Path | None = None,
    eval: Path | None = None,  # noqa: A002
    max_memory: int | None = None,
) -> Trainer:
    """Return a trainer that resumes a run; see :meth:`Trainer.resume`.

    Parameters
    ----------
    run : path
        The run's folder.
    bundle, train, eval : path, optional
        The base bundle and the files of examples, if they were moved.
    max_memory : int, optional
        See :func:`pocketzo.load`.
    """
    past = Run(run)
    source = past.recipe.data.source
    train = train or (None if source.train is None else Path(source.train))
    if train is None:
        raise JournalError(f"{run}: its journal does not say where the data is: name it with --data")
    eval = eval or (None if source.eval is None else Path(source.eval))  # noqa: A001
    read = Bundle.read(past.recipe.model.bundle if bundle is None else bundle)
    train_data = load_dataset(train, read, columns=source.columns)
    eval_data = None if eval is None else load_dataset(eval, read, columns=source.columns)
    session = past.recipe.session
    threads = use_threads(session)
    model = None
    if bundle is not None or max_memory is not None:
        model = load_as(read, past.recipe, threads=threads, max_memory=max_memory)
    return Trainer.resume(run, train_data, eval=eval_data, model=model)


def use_threads(session: Session) -> int:
    """Return the number of threads of a run's forward passes; set the kernels to it if the user chose it."""
    if session.forward_seconds is None:
        kernels.set_threads(session.threads)
    return session.threads
