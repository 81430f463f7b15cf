"""Going on with a run from its folder: its journal says where the bundle and the data are."""

from __future__ import annotations

import os
from pathlib import Path

from pocketzo import kernels
from pocketzo.data.load import load_dataset
from pocketzo.errors import JournalError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.load import load
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
    """Make the trainer that goes on with a run; see :meth:`Trainer.resume`.

    Parameters
    ----------
    run : path
        The run's folder.
    bundle, train, eval : path, optional
        Where the base bundle and the files of examples are, if they were moved.
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
        model = load(read, threads=threads, prepack=session.prepack, max_memory=max_memory)
    return Trainer.resume(run, train_data, eval=eval_data, model=model)


def use_threads(session: Session) -> int:
    """Return the threads of a run's forwards, and have the kernels use as many if the user chose them."""
    if session.forward_seconds is None:
        kernels.set_threads(session.threads)
    return session.threads
