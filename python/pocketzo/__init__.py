"""PocketZO: fine-tune an ONNX model in place, in the memory that running it takes."""

from __future__ import annotations

from pocketzo import kernels
from pocketzo._core import __version__
from pocketzo.bundle import Bundle
from pocketzo.data import Dataset, encode_texts, load_dataset
from pocketzo.errors import (
    BundleError,
    DataError,
    DeadWeightError,
    Error,
    JournalError,
    MemoryLimitError,
    MissingExtraError,
    TrainingError,
)
from pocketzo.model import Model, load
from pocketzo.optim import FZOO, Group, MeZO, Optimizer, Schedule, StepInfo
from pocketzo.prepare import prepare
from pocketzo.trainer import Progress, Run, Trainer, evaluate

__all__ = [
    "FZOO",
    "Bundle",
    "BundleError",
    "DataError",
    "Dataset",
    "DeadWeightError",
    "Error",
    "Group",
    "JournalError",
    "MeZO",
    "MemoryLimitError",
    "MissingExtraError",
    "Model",
    "Optimizer",
    "Progress",
    "Run",
    "Schedule",
    "StepInfo",
    "Trainer",
    "TrainingError",
    "__version__",
    "encode_texts",
    "evaluate",
    "kernels",
    "load",
    "load_dataset",
    "prepare",
]
