"""A plain text file as examples: windows of consecutive tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from pocketzo.data.examples import Encoded, Row, end_of_text
from pocketzo.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def windows(path: Path, lines: list[str], tokenizer: Tokenizer, length: int) -> Iterator[tuple[int, Encoded]]:
    """Cut a text into windows of so many tokens; yield the line in which each begins, from 1, and its tokens.

    A window begins with what the tokenizer puts before a text, such as a first token. All other tokens count, but for
    the first one of a window that begins with nothing. A last window in which nothing counts is left out.

    Parameters
    ----------
    path : Path
        For messages.
    lines : list of str
        The text, with its line ends.
    tokenizer : Tokenizer
        Does not truncate.
    length : int
    """
    starts = [0, *accumulate(map(len, lines))]
    encoding = tokenizer.encode("".join(lines))
    special = encoding.special_tokens_mask
    first = next((at for at, flag in enumerate(special) if not flag), len(special))
    last = end_of_text(encoding)
    before, size = encoding.ids[:first], length - first
    if size < 1 or length < 2:
        raise DataError(f"{path}: a maximum length of {length} tokens leaves no room for text: allow 2 or more")
    for at in range(first, last, size):
        ids = before + encoding.ids[at : min(at + size, last)]
        counted = [index >= max(1, len(before)) for index in range(len(ids))]
        if any(counted):
            line = bisect_right(starts, encoding.offsets[at][0])
            yield min(line, len(lines)), Encoded([Row(ids, [0] * len(ids), counted)], None)
