"""Tokenise text."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketzo.data.dataset import IMPLIED, TOKEN_INPUTS, Dataset, Tokens, token_limit
from pocketzo.data.examples import Encoded, Example, Problems
from pocketzo.errors import BundleError, DataError
from pocketzo.runtime.embeddings import embedding_rows
from pocketzo.runtime.padding import pads_right_only
from pocketzo.runtime.tokenizer import load_tokenizer
from pocketzo.tasks.base import IGNORED

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from pocketzo.tasks.base import Task

CHUNK = 256  # texts tokenised at once: limits the memory used in addition to the ids


def _encoded(task: Task, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Encoded]:
    try:
        return task.encode(tokenizer, examples)
    except Exception as error:
        if type(error) is not Exception:  # the library raises no narrower type
            raise
        path = task.bundle.tokenizer_path
        raise BundleError(f"{path}: the tokenizers library cannot use it: {' '.join(str(error).split())}") from error


def tokenise(examples: Iterator[tuple[int, Example]], task: Task, problems: Problems) -> Dataset:
    """Tokenise numbered examples in chunks."""
    bundle = task.bundle
    tokenizer = load_tokenizer(bundle)
    padding = tokenizer.padding or {}
    pads = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>", "<PAD>", "<|pad|>"))
    pad_id = padding.get("pad_id", next((pad for pad in pads if pad is not None), 0))
    fills = {"input_ids": pad_id, "token_type_ids": padding.get("pad_type_id", 0), "labels": IGNORED}
    tokenizer.no_padding()
    longest = token_limit(bundle)
    if longest is not None:  # otherwise the tokenizer's own truncation, if any, applies
        tokenizer.enable_truncation(longest, direction=(tokenizer.truncation or {}).get("direction", "right"))
    rows = embedding_rows(bundle).get("input_ids", 2**31)
    if pad_id >= rows:
        raise DataError(
            f"{bundle.tokenizer_path}: the id of the padding token is {pad_id}, the model's embedding has {rows} rows: "
            "name another token for the padding in this file"
        )
    special = [tokenizer.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]

    ids, types, by_token = array("i"), array("i"), array("i")
    lengths, labels, lines = array("i"), list[Any](), array("q")
    cut = 0
    while chunk := list(islice(examples, CHUNK)):
        encoded = _encoded(task, tokenizer, [example for _, example in chunk])
        for (number, example), row in zip(chunk, encoded, strict=True):
            if longest is not None and longest <= special[example.pair is not None]:
                problems.add(number, f"a maximum length of {longest} tokens leaves no room for the text")
            if not row.ids:
                problems.add(number, "the tokenizer finds no token in the text")
            elif max(row.ids) >= rows:
                problems.add(
                    number,
                    f"the tokenizer gives token id {max(row.ids)}, the model's embedding has {rows} rows: prepare the "
                    "model with its own tokenizer",
                )
            ids.extend(row.ids)
            types.extend(row.type_ids)
            lengths.append(len(row.ids))
            lines.append(number)
            cut += row.cut
            if row.label is not None and task.labels_per == "token":
                by_token.extend(row.label)
            elif row.label is not None:
                labels.append(row.label)
    problems.check()
    if not lengths:
        raise DataError(f"{problems.source}: no examples")
    columns = {"input_ids": np.asarray(ids), "token_type_ids": np.asarray(types)}
    if by_token:
        columns["labels"] = np.asarray(by_token)
    pad_left = padding.get("direction") == "left" and not pads_right_only(bundle)
    tokens = keep_tokens(task, np.asarray(lengths), columns, fills, pad_left=pad_left)
    return Dataset(task, problems.source, len(lengths), tokens, {}, labels, lines, cut)


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
