"""Load examples from a file. Every line is checked before a dataset is returned.

========  ==========================================================================================================
suffix    content
========  ==========================================================================================================
.jsonl    one object per line; its keys are the columns
.tsv      fields between tabs, taken verbatim: no quoting, no escapes
.csv      fields between commas; double quotes allow commas and line breaks in a field
.txt      for ``causal-lm``: one text, cut into windows of the model's maximum length
.npz      arrays named as the model's inputs, one row per example: ``input_ids`` [n, length], optionally
          ``attention_mask`` and ``token_type_ids`` of the same shape, or the model's other inputs; ``labels`` [n],
          [n, length] for token labels, or [n, columns] for several numbers or for 0 and 1 by label
========  ==========================================================================================================

Text is UTF-8, or UTF-16 with a byte order mark. Lines end in LF or CRLF; in CR, if the file has no LF. A byte order
mark and empty lines at the end are accepted. ``Columns(delimiter=";")`` reads fields between other characters.

Columns are found by name, upper or lower case; others are ignored. Two of the same name but for the case are refused.
The bundle's task says which columns it reads:

- ``classification``: the text in ``text``, ``sentence`` or ``sentence1``; its optional pair in ``text_pair`` or
  ``sentence2``; the class in ``label`` or ``labels``;
- ``token-classification``: the words in ``tokens``, ``words``, ``text`` or ``sentence``; their classes in ``labels``,
  ``tags`` or ``label``. Each is a list, or a string that is split at white space;
- ``multi-label``: text and pair as in ``classification``; the labels in ``labels`` or ``label``: a list, or a string
  that is split at commas, and, unless the name of a label contains white space, at white space. None, as in an empty
  string, means that no label applies;
- ``prompt``: as ``classification``;
- ``causal-lm``: a text in ``text``; or in ``prompt`` and ``completion``; or a chat, a list of
  ``{"role": "user", "content": "..."}``, in ``messages``;
- ``choice``: the text before in ``context``; a list of texts in ``choices``; the number of the right one in ``label``;
- ``regression``: text and pair as in ``classification``; the number in ``label``, ``labels``, ``score`` or ``target``;
  for several numbers, a list, or a string that is split at commas and white space.

The first row of a TSV or CSV file is a header if one cell names the text, and it is the only cell or another cell names
the pair or the label. It is always a header if the caller names a column. Without a header the columns are: text; or
text, label; or text, text_pair, label.

The label of a class is a class name of the bundle, or a class number from 0. If a class name looks like a number,
labels must be names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketzo.errors import DataError

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle
    from pocketzo.tasks.base import Task
from pocketzo.data.columns import Columns
from pocketzo.data.dataset import Dataset
from pocketzo.data.examples import Problems, examples_of
from pocketzo.data.npz import read_npz
from pocketzo.data.readers import read_csv, read_jsonl, read_tsv
from pocketzo.data.tables import with_columns
from pocketzo.data.tokens import tokenise, tokenise_windows
from pocketzo.tasks.causal_lm import CausalLM
from pocketzo.tasks.registry import task_of


def load_dataset(
    path: str | os.PathLike[str],
    bundle: Bundle,
    *,
    require_labels: bool = True,
    columns: Columns = Columns(),  # noqa: B008 - frozen
) -> Dataset:
    """Load a file of examples for a model.

    The limit on tokens is the bundle's maximum length, or the fixed length of the model's inputs. Longer texts are
    truncated. Longer rows of token ids are an error.

    Parameters
    ----------
    path
        A ``.jsonl``, ``.tsv``, ``.csv``, ``.txt`` or ``.npz`` file, as described in :mod:`pocketzo.data.load`.
    bundle
        The model that the examples are for.
    require_labels
        Whether each example must have a label. If False, either all examples have one or none has.
    columns
        Column names, for a file that does not use the usual ones, and the delimiter. A TSV or CSV file whose columns
        are named must have a header. In an ``.npz`` file, only the array of labels can be named.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        The file is missing, empty or of an unknown kind; a line cannot be used; or an input of the model cannot be
        filled. The message names the first bad line, its reason and the number of other bad lines.
    ValueError
        ``columns`` names a column that the bundle's task does not read.
    BundleError
        The bundle's tokenizer cannot be read.
    MissingExtraError, BrokenPackageError
        The file holds text, and the package `tokenizers` is not installed, or cannot be imported.
    """
    path = Path(path)
    task = task_of(bundle)
    for role, _ in columns.named():
        if role not in task.columns:
            raise ValueError(f"{bundle.path}: task {task.name!r} reads no column for {role!r}")
    try:
        match path.suffix.lower():
            case ".npz":
                return read_npz(path, task, columns, require_labels)
            case ".txt" if isinstance(task, CausalLM):
                return tokenise_windows(path, task, Problems(str(path), "line"))
        records = records_of(path, task, columns, require_labels)
        problems = Problems(str(path), "line")
        return tokenise(examples_of(records, task, columns, require_labels, problems), task, problems)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged {error.encoding.upper()}: {error.reason}") from None


def records_of(path: Path, task: Task, columns: Columns, require_labels: bool) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line of a text file and its values by column, or the reason why it has none.

    Raises
    ------
    DataError
        The file is of an unknown kind.
    """
    match path.suffix.lower():
        case ".jsonl":
            return read_jsonl(path)
        case ".tsv":
            return with_columns(read_tsv(path, columns.delimiter or "\t"), columns, task, require_labels)
        case ".csv":
            return with_columns(read_csv(path, columns.delimiter or ","), columns, task, require_labels)
        case suffix:
            more = ", .txt" if isinstance(task, CausalLM) else ""
            raise DataError(f"{path}: unknown kind of file {suffix!r}: expected .jsonl, .tsv, .csv{more} or .npz")


def encode_texts(texts: Iterable[str], bundle: Bundle) -> Dataset:
    """Tokenise sentences without labels.

    Parameters
    ----------
    texts
        The sentences.
    bundle
        The model that the sentences are for.

    Returns
    -------
    Dataset

    Raises
    ------
    TypeError
        `texts` is a single string.
    DataError
        There is no text, a text is empty or not a string, or the model has inputs that text cannot fill.
    BundleError, MissingExtraError, BrokenPackageError
        As for :func:`load_dataset`.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be several strings, got one: put it in a list")
    problems = Problems("texts", "number")
    task = task_of(bundle)
    records = enumerate(({"text": text} for text in texts), 1)
    return tokenise(examples_of(records, task, Columns(), False, problems), task, problems)
