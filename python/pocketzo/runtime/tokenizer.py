"""Opening a tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pocketzo.errors import BundleError, DataError, joined_lines
from pocketzo.packages import require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pocketzo.formats.bundle import Bundle


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """Read a bundle's tokenizer.

    Raises
    ------
    BundleError
        The tokenizers library cannot read the file.
    DataError
        The bundle has no tokenizer.
    """
    if bundle.tokenizer_path is None:
        raise DataError(
            f"{bundle.path}: the bundle has no tokenizer for text: prepare it with one, or give token ids as .npz"
        )
    return open_tokenizer(bundle.tokenizer_path)


def open_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises
    ------
    BundleError
        The tokenizers library cannot read the file.
    """
    # Its threads would outlive tokenisation, hold memory and cause a warning at every later fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    require("tokenizers")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises no narrower type
        reason = joined_lines(error)
        raise BundleError(f"{path}: the tokenizers library cannot read it: {reason}") from error
