"""PocketZO: fine-tune an ONNX model in place, in the memory that inference takes."""

from __future__ import annotations

from pocketzo.errors import (
    BrokenPackageError,
    BundleError,
    DataError,
    DeadWeightError,
    Error,
    JournalError,
    MemoryLimitError,
    MissingExtraError,
    TrainingError,
)
from pocketzo.packages import core_problem

_problem = core_problem()
if _problem is None:
    from pocketzo import kernels
    from pocketzo._core import __version__
    from pocketzo.data.batch import Batch
    from pocketzo.data.chat import chat_text
    from pocketzo.data.columns import Columns
    from pocketzo.data.dataset import Dataset
    from pocketzo.data.load import encode_texts, load_dataset
    from pocketzo.formats.bundle import Bundle
    from pocketzo.optim.block import Block
    from pocketzo.optim.fzoo import FZOO
    from pocketzo.optim.groups import ParamGroup
    from pocketzo.optim.lozo import LOZO
    from pocketzo.optim.mezo import MeZO
    from pocketzo.optim.momentum import Momentum
    from pocketzo.optim.optimizer import Optimizer, StepInfo
    from pocketzo.optim.pace import Pace
    from pocketzo.optim.schedule import Schedule
    from pocketzo.optim.sign import Sign
    from pocketzo.prepare import prepare
    from pocketzo.runtime.cut import Cut, plan_cut
    from pocketzo.runtime.load import load
    from pocketzo.runtime.model import Model
    from pocketzo.tasks.evaluate import evaluate
    from pocketzo.tasks.exact_match import complete, exact_match
    from pocketzo.train.head.train import TrainedHead, train_head
    from pocketzo.train.progress import Progress
    from pocketzo.train.run import Run
    from pocketzo.train.trainer import Trainer
    from pocketzo.train.tuned import load_adapter, merge, write_adapter
else:

    def __getattr__(name: str) -> object:
        """Raise the error that keeps everything from working; ``pocketzo doctor`` needs to import the package."""
        if name in __all__ and _problem is not None:
            raise _problem
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "FZOO",
    "LOZO",
    "Batch",
    "Block",
    "BrokenPackageError",
    "Bundle",
    "BundleError",
    "Columns",
    "Cut",
    "DataError",
    "Dataset",
    "DeadWeightError",
    "Error",
    "JournalError",
    "MeZO",
    "MemoryLimitError",
    "MissingExtraError",
    "Model",
    "Momentum",
    "Optimizer",
    "Pace",
    "ParamGroup",
    "Progress",
    "Run",
    "Schedule",
    "Sign",
    "StepInfo",
    "TrainedHead",
    "Trainer",
    "TrainingError",
    "__version__",
    "chat_text",
    "complete",
    "encode_texts",
    "evaluate",
    "exact_match",
    "kernels",
    "load",
    "load_adapter",
    "load_dataset",
    "merge",
    "plan_cut",
    "prepare",
    "train_head",
    "write_adapter",
]
