"""Text to token ids."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from pocketzo.errors import BundleError, DataError, MissingExtraError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from pocketzo.formats.bundle import Bundle
from pocketzo.data.dataset import IMPLIED, TOKEN_INPUTS, Dataset, Tokens, token_limit
from pocketzo.data.examples import Example, Problems

CHUNK = 256  # texts tokenised at once: bounds the memory held beside the ids


def _load_tokenizer(bundle: Bundle) -> Tokenizer:
    if bundle.tokenizer_path is None:
        raise DataError(
            f"{bundle.path}: the bundle has no tokenizer for text: prepare it with one, or give token ids as .npz"
        )
    # Its threads would outlive the tokenising, hold memory and warn at every fork after it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers", "text") from error
    try:
        tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    except Exception as error:  # the library raises no narrower one
        raise BundleError(f"{bundle.tokenizer_path}: the tokenizers library cannot read it: {error}") from error
    return tokenizer


def tokenise(examples: Iterator[Example], bundle: Bundle, problems: Problems) -> Dataset:
    """Tokenise examples in chunks."""
    tokenizer = _load_tokenizer(bundle)
    padding = tokenizer.padding or {}
    pads = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>", "<PAD>", "<|pad|>"))
    pad_id = padding.get("pad_id", next((pad for pad in pads if pad is not None), 0))
    fills = {"input_ids": pad_id, "token_type_ids": padding.get("pad_type_id", 0)}
    tokenizer.no_padding()
    longest = token_limit(bundle)
    if longest is not None:  # else the tokenizer's own truncation, if any, holds
        tokenizer.enable_truncation(longest, direction=(tokenizer.truncation or {}).get("direction", "right"))
    special = [tokenizer.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]

    ids, types, lengths, labels = array("i"), array("i"), array("i"), array("q")
    while chunk := list(islice(examples, CHUNK)):
        encodings = tokenizer.encode_batch([e.text if e.pair is None else (e.text, e.pair) for e in chunk])
        for example, encoding in zip(chunk, encodings, strict=True):
            if longest is not None and longest <= special[example.pair is not None]:
                problems.add(example.number, f"a maximum length of {longest} tokens leaves no room for the text")
            if not encoding.ids:
                problems.add(example.number, "the tokenizer finds no token in the text")
            ids.extend(encoding.ids)
            types.extend(encoding.type_ids)
            lengths.append(len(encoding.ids))
            if example.label is not None:
                labels.append(example.label)
    problems.check()
    if not lengths:
        raise DataError(f"{problems.source}: no examples")
    columns = {"input_ids": np.asarray(ids), "token_type_ids": np.asarray(types)}
    tokens = keep_tokens(bundle, np.asarray(lengths), columns, fills, pad_left=padding.get("direction") == "left")
    return Dataset(bundle, problems.source, len(lengths), tokens, {}, labels)


def keep_tokens(
    bundle: Bundle,
    lengths: NDArray[np.int32],
    columns: Mapping[str, NDArray[np.int32]],
    fills: Mapping[str, int],
    *,
    pad_left: bool = False,
) -> Tokens:
    """Keep what the model takes and nothing that is implied: the same tokens are then the same from any file."""
    names = [spec.name for spec in bundle.inputs if spec.name in TOKEN_INPUTS]
    kept = {
        name: values
        for name, values in columns.items()
        if name in names and not (name in IMPLIED and (values == IMPLIED[name]).all())
    }
    return Tokens(lengths, kept, {name: fills.get(name, 0) for name in names}, pad_left)
