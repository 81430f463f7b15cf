"""Tokenise text."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketzo.data.dataset import IMPLIED, Dataset, Tokens, token_limit
from pocketzo.data.examples import Encoded, Example, Problems, Row
from pocketzo.data.readers import read_txt
from pocketzo.data.windows import windows
from pocketzo.errors import BundleError, DataError, joined_lines
from pocketzo.formats.inputs import TOKEN_INPUTS
from pocketzo.runtime.embeddings import embedding_rows
from pocketzo.runtime.padding import pads_right_only
from pocketzo.runtime.tokenizer import load_tokenizer
from pocketzo.tasks.base import IGNORED

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from pocketzo.tasks.base import Task

CHUNK = 256  # texts tokenised at once: limits the memory used in addition to the ids


def _encoded(task: Task, tokenizer: Tokenizer, examples: Sequence[Example], limit: int | None) -> list[Encoded]:
    try:
        return task.encode(tokenizer, examples, limit)
    except Exception as error:
        if type(error) is not Exception:  # the library raises no narrower type
            raise
        path = task.bundle.tokenizer_path
        raise BundleError(f"{path}: the tokenizers library cannot use it: {joined_lines(error)}") from error


def tokenise(examples: Iterator[tuple[int, Example]], task: Task, problems: Problems) -> Dataset:
    """Tokenise numbered examples in chunks."""
    tokenizer = load_tokenizer(task.bundle)
    rows = _Rows(task, tokenizer, problems)
    longest = token_limit(task.bundle)
    own = tokenizer.truncation or {}  # applies if the model sets no limit
    if task.cuts:
        tokenizer.no_truncation()
        longest = own.get("max_length") if longest is None else longest
    elif longest is not None:
        tokenizer.enable_truncation(longest, direction=own.get("direction", "right"))
    special = [tokenizer.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]
    while chunk := list(islice(examples, CHUNK)):
        encoded = _encoded(task, tokenizer, [example for _, example in chunk], longest)
        for (number, example), one in zip(chunk, encoded, strict=True):
            if not task.cuts and longest is not None and longest <= special[example.pair is not None]:
                problems.add(number, f"a maximum length of {longest} tokens leaves no room for the text")
            rows.add(number, one)
    return rows.dataset()


def tokenise_windows(path: Path, task: Task, problems: Problems) -> Dataset:
    """Cut a plain text file into examples of the model's maximum length."""
    tokenizer = load_tokenizer(task.bundle)
    rows = _Rows(task, tokenizer, problems)
    length = token_limit(task.bundle) or (tokenizer.truncation or {}).get("max_length")
    if length is None:
        raise DataError(
            f"{path}: a .txt file is cut into windows of the bundle's max_length tokens, and it has none: prepare the "
            "model with --max-length"
        )
    tokenizer.no_truncation()
    for line, window in windows(path, read_txt(path), tokenizer, length):
        rows.add(line, window)
    return rows.dataset()


class _Rows:
    """Collects tokenised examples.

    Parameters
    ----------
    task : Task
    tokenizer : Tokenizer
        Padding, which batches get later, is switched off.
    problems : Problems
        Gets those of examples that cannot be used.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, problems: Problems) -> None:
        self._task = task
        self._problems = problems
        padding = tokenizer.padding or {}
        pads = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>", "<PAD>", "<|pad|>"))
        pad_id = padding.get("pad_id", next((pad for pad in pads if pad is not None), 0))
        tokenizer.no_padding()
        rows = embedding_rows(task.bundle)
        embedded, self._types_embedded = (rows.get(name, 2**31) for name in ("input_ids", "token_type_ids"))
        if pad_id >= embedded and task.cuts:
            pad_id = 0  # any token will do behind the last one that counts
        if pad_id >= embedded:
            raise DataError(
                f"{task.bundle.tokenizer_path}: the id of the padding token is {pad_id}, the model's embedding has "
                f"{embedded} rows: name another token for the padding in this file"
            )
        self._embedded = embedded
        self._fills = {"input_ids": pad_id, "token_type_ids": padding.get("pad_type_id", 0), "labels": IGNORED}
        self._pad_left = padding.get("direction") == "left" and not task.cuts and not pads_right_only(task.bundle)
        self._ids, self._types, self._by_token, self._counted = array("i"), array("i"), array("i"), array("b")
        self._lengths, self._row_starts, self._lines = array("i"), array("q", [0]), array("q")
        self._prompted = array("b")
        self._labels: list[Any] = []
        self._cut = 0

    def add(self, number: int, example: Encoded) -> None:
        """Add an example; `number` is that of its line."""
        if example.problem is not None:
            self._problems.add(number, example.problem)
        for row in example.rows:
            if (problem := self._problem(row)) is not None:
                self._problems.add(number, problem)
                continue
            self._ids.extend(row.ids)
            self._types.extend(row.type_ids)
            self._counted.extend(row.counted or ())
            self._lengths.append(len(row.ids))
        self._row_starts.append(len(self._lengths))
        self._lines.append(number)
        self._cut += example.cut
        self._prompted.append(example.prompted)
        if example.label is not None and self._task.labels_per == "token":
            self._by_token.extend(example.label)
        elif example.label is not None:
            self._labels.append(example.label)

    def _problem(self, row: Row) -> str | None:
        if not row.ids:
            return "the tokenizer finds no token in the text"
        for what, ids, rows in (("id", row.ids, self._embedded), ("type", row.type_ids, self._types_embedded)):
            if max(ids, default=0) >= rows:
                return (
                    f"the tokenizer gives token {what} {max(ids)}, the model's embedding has {rows} rows: prepare the "
                    "model with its own tokenizer"
                )
        return None

    def dataset(self) -> Dataset:
        """Return the examples, unless there was a problem, or there are none."""
        self._problems.check()
        if not self._lines:
            raise DataError(f"{self._problems.source}: no examples")
        columns = {"input_ids": np.asarray(self._ids), "token_type_ids": np.asarray(self._types)}
        if self._by_token:
            columns["labels"] = np.asarray(self._by_token)
        tokens = keep_tokens(self._task, np.asarray(self._lengths), columns, self._fills, pad_left=self._pad_left)
        if self._counted:
            tokens = replace(tokens, counted=np.asarray(self._counted).astype(bool), shift=self._task.shift)
            tokens = replace(tokens, prompted=np.asarray(self._prompted).astype(bool))
        if self._task.several_rows:
            tokens = replace(tokens, row_starts=np.asarray(self._row_starts))
        return Dataset(
            self._task, self._problems.source, len(self._lines), tokens, {}, self._labels, self._lines, self._cut
        )


def keep_tokens(
    task: Task,
    lengths: NDArray[np.int32],
    columns: Mapping[str, NDArray[np.int32]],
    fills: Mapping[str, int],
    *,
    pad_left: bool = False,
) -> Tokens:
    """Keep the columns that the model or its metrics take, without implied values.

    So equal tokens from any file compare equal. ``columns`` hold one value per token. They are token inputs, and
    optionally ``labels``.
    """
    names = [spec.name for spec in task.bundle.inputs if spec.name in (*TOKEN_INPUTS, *columns)]
    if "labels" in columns and task.label_spec is not None and task.label_input is None:
        names.append("labels")
    kept = {
        name: values
        for name, values in columns.items()
        if name in names and not (name in IMPLIED and (values == IMPLIED[name]).all())
    }
    return Tokens(lengths, kept, {name: fills.get(name, 0) for name in names}, pad_left)
