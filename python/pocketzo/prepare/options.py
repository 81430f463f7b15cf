"""Check the options of :func:`pocketzo.prepare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pocketzo.errors import BundleError
from pocketzo.tasks.base import is_column

if TYPE_CHECKING:
    from pocketzo.formats.bundle import TaskSpec, ValueSpec

LOSSES: Final = ("cross-entropy", "bce", "mse", "none")
"""What :func:`pocketzo.prepare` takes as the loss."""
TASKS: Final = ("prompt", "causal-lm", "choice")
"""The tasks of language models, for which it derives a training graph."""
HEAD_ONLY: Final = ("classification", "multi-label", "regression")
"""Tasks that are for side heads alone; ``"prompt"`` is for both."""
SIDE_HEAD: Final = "side-head"
"""What the trainable set of a side head is called."""
PER: Final = ("sum", "token")
"""What the log-likelihood of a choice is: that of all its tokens, or its mean over them."""


def checked_names(option: str, names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the strings of an option; raise TypeError or ValueError unless all are different and none is empty."""
    if names is None:
        return None
    if isinstance(names, str) or not all(type(name) is str for name in names):
        raise TypeError(f"{option} must be a sequence of str, got {names!r}")
    if not names or not all(names) or len(set(names)) != len(names):
        raise ValueError(f"{option} must be different names, none of them empty, got {list(names)!r}")
    return tuple(names)


def check_class_names(names: Sequence[str], scores: ValueSpec | None, task: TaskSpec | None) -> None:
    """Raise BundleError unless the task has classes, as many as names."""
    if scores is None:
        raise BundleError(
            "labels given, but the graph has no output 'logits' to which they could belong: state the loss, such as "
            "--loss cross-entropy of its only float output"
        )
    if task is None or "labels" not in task.settings:
        raise BundleError(f"labels given, but {scores.name!r}, the input 'labels' and the loss do not fit to classes")
    count = 2 if is_column(scores) else scores.shape[-1]
    if isinstance(count, int) and count != len(names):
        raise BundleError(f"{len(names)} labels given, but {scores.name!r} has {count} classes")


def check_tokenizer(path: Path) -> None:
    """Raise BundleError unless a file may be a ``tokenizer.json``."""
    try:
        if isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            return
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file") from None
    except (OSError, ValueError):
        pass
    raise BundleError(f"{path}: not a tokenizer.json: expected a JSON object")
