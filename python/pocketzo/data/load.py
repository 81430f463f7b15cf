"""Labelled examples: read from a file, checked to the last line, kept as token ids, handed out in padded batches.

========  ==========================================================================================================
suffix    content
========  ==========================================================================================================
.jsonl    one object a line, whose keys are the columns
.tsv      fields between tabs, taken verbatim: a quote is a character like any other, nothing is escaped
.csv      fields between commas, in double quotes where needed, line breaks within quotes included
.npz      arrays named as the model's inputs, one row an example: ``input_ids`` [n, length], ``attention_mask`` and
          ``token_type_ids`` of the same shape if need be, or whatever else the model takes; ``labels`` [n], or
          [n, length] where tokens have them
========  ==========================================================================================================

Text is UTF-8; a byte order mark, CRLF and empty lines at the end are accepted.

Columns are found by name, upper or lower case; others are ignored. The bundle's task says which columns it reads:

- ``classification``: the text in ``text``, ``sentence`` or ``sentence1``, its pair, if any, in ``text_pair`` or
  ``sentence2``, the class in ``label`` or ``labels``;
- ``token-classification``: the words in ``tokens``, ``words``, ``text`` or ``sentence``, their classes in ``labels``,
  ``tags`` or ``label``; either a list, or a string to be split at white space.

The first row of a TSV or CSV file is a header if one cell names the text and either there is no other or another names
the pair or the label, and always if the caller names a column. Without a header the columns are: text; or text, label;
or text, text_pair, label.

A label is a class name of the bundle or a class number, from 0; where names look like numbers, a name only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from pocketzo.errors import DataError

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle
from pocketzo.data.columns import Columns
from pocketzo.data.dataset import Dataset
from pocketzo.data.examples import Problems, examples_of
from pocketzo.data.npz import read_npz
from pocketzo.data.readers import read_csv, read_jsonl, read_tsv, with_columns
from pocketzo.data.tokens import tokenise
from pocketzo.tasks.registry import task_of


def load_dataset(
    path: str | os.PathLike[str],
    bundle: Bundle,
    *,
    require_labels: bool = True,
    columns: Columns = Columns(),  # noqa: B008 - frozen
) -> Dataset:
    """Read a file of examples for a model; the whole file is checked before anything is returned.

    Text of more tokens than the bundle's maximum length, or than a fixed length of its inputs, is truncated; rows of
    token ids that are longer are refused.

    Parameters
    ----------
    path
        A ``.jsonl``, ``.tsv``, ``.csv`` or ``.npz`` file, as described in :mod:`pocketzo.data.load`.
    bundle
        The model that the examples are for.
    require_labels
        Whether each example must have a label. If not, either all have one or none has.
    columns
        The names of columns that are called otherwise; a TSV or CSV file must then have a header. In an ``.npz``, only
        the labels' array can be named.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        The file is missing, empty or of an unknown kind; or a line of it cannot be used: the first such line is named,
        with the reason and the number of others; or it lacks what an input of the model needs.
    BundleError
        The bundle's tokenizer cannot be read.
    MissingExtraError
        The file holds text, and the package `tokenizers` is not installed.
    """
    path = Path(path)
    task = task_of(bundle)
    for field in fields(columns):
        if getattr(columns, field.name) is not None and field.name not in task.columns:
            raise ValueError(f"{bundle.path}: task {task.name!r} reads no column for {field.name!r}")
    try:
        match path.suffix.lower():
            case ".npz":
                return read_npz(path, task, columns, require_labels)
            case ".jsonl":
                records = read_jsonl(path)
            case ".tsv":
                records = with_columns(read_tsv(path), columns, task)
            case ".csv":
                records = with_columns(read_csv(path), columns, task)
            case suffix:
                raise DataError(f"{path}: unknown kind of file {suffix!r}: expected .jsonl, .tsv, .csv or .npz")
        problems = Problems(str(path), "line")
        return tokenise(examples_of(records, task, columns, require_labels, problems), task, problems)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def encode_texts(texts: Iterable[str], bundle: Bundle) -> Dataset:
    """Tokenise sentences without labels.

    Parameters
    ----------
    texts
        The sentences.
    bundle
        The model that they are for.

    Returns
    -------
    Dataset

    Raises
    ------
    TypeError
        `texts` is itself a string.
    DataError
        There is no text, or one is empty or no string, or the model has inputs that text cannot fill.
    BundleError, MissingExtraError
        As for :func:`load_dataset`.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be several strings, got one: put it in a list")
    problems = Problems("texts", "number")
    task = task_of(bundle)
    records = enumerate(({"text": text} for text in texts), 1)
    return tokenise(examples_of(records, task, Columns(), False, problems), task, problems)
