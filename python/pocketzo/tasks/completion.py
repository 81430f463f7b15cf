"""A text's continuation as tokens, of which only the continuation's count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pocketzo.data.examples import Row, end_of_text

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


def row_of(encoding: Encoding, counted: Sequence[bool]) -> Row:
    """Return the first tokens of an encoding as a row, as many as it is said of whether they count.

    The first one never counts, as no token precedes it from which it could be predicted; tokens after the last one that
    counts are left out, as they would change nothing.
    """
    flags = [bool(index and one) for index, one in enumerate(counted)]
    while flags and not flags[-1]:
        flags.pop()
    return Row(encoding.ids[: len(flags)], encoding.type_ids[: len(flags)], flags)


def completed(tokenizer: Tokenizer, prompts: Sequence[str], completions: Sequence[str], end: int | None) -> list[Row]:
    """Return prompts with their completions, of which the completions' tokens count.

    Prompt and completion are tokenised as one text, if the prompt then has the tokens that it has alone, as when text
    is generated from it; else the completion is tokenised by itself.

    Parameters
    ----------
    tokenizer : Tokenizer
        Does not truncate.
    prompts, completions : sequence of str
    end : int or None
        A token to append, which counts.
    """
    rows = []
    starts = tokenizer.encode_batch(list(prompts))
    wholes = tokenizer.encode_batch([a + b for a, b in zip(prompts, completions, strict=True)])
    for start, whole, completion in zip(starts, wholes, completions, strict=True):
        first = start.ids[: end_of_text(start)]
        ids = whole.ids[: end_of_text(whole)]
        if ids[: len(first)] != first or len(ids) == len(first):
            ids = first + tokenizer.encode(completion, add_special_tokens=False).ids
        if len(ids) > len(first) and end is not None:
            ids.append(end)
        counted = [index >= max(1, len(first)) for index in range(len(ids))]
        rows.append(Row(ids, [0] * len(ids), counted))
    return rows


def too_long(row: Row, limit: int | None, of: str) -> str | None:
    """Return why a row cannot be learnt, in words; None if it can.

    Parameters
    ----------
    row : Row
    limit : int or None
        The most tokens that the model takes.
    of : str
        What the row holds, such as "the completion".
    """
    if not any(row.counted or ()):
        return f"{of} has no token that is predicted from one before it"
    if limit is not None and len(row.ids) > limit:
        return (
            f"{len(row.ids)} tokens, and the model takes at most {limit}, so that {of} would be cut: shorten it, or "
            "prepare the model with a larger max_length"
        )
    return None
