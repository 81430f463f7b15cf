"""The built-in example of a language model: a quantised SmolLM2 learns a page of notes by LoRA, on this machine.

The notes and the questions about them are made up. Training reads the page alone. It prints nothing itself:
``pocketzo demo notes`` does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from pocketzo import kernels
from pocketzo.adapters.write import Format
from pocketzo.arguments import check_integer
from pocketzo.data.dataset import Dataset
from pocketzo.data.load import load_dataset
from pocketzo.demo.folders import refuse_foreign, remove_earlier
from pocketzo.demo.smollm2 import find_gguf
from pocketzo.errors import Error, MissingExtraError
from pocketzo.formats.bundle import ADAPTER, FILES, MODEL, WEIGHTS
from pocketzo.formats.generation import GENERATE
from pocketzo.formats.staging import scratch_folder
from pocketzo.machine.memory import process_memory, reset_peak, trim_heap
from pocketzo.optim.momentum import Momentum
from pocketzo.optim.schedule import Schedule
from pocketzo.packages import EXTRAS, version
from pocketzo.prepare import prepare
from pocketzo.runtime.load import load
from pocketzo.runtime.model import Model
from pocketzo.tasks.evaluate import evaluate
from pocketzo.tasks.exact_match import complete
from pocketzo.train.plot import PLOT
from pocketzo.train.recipe import Source
from pocketzo.train.run import JOURNAL, METRICS
from pocketzo.train.trainer import Trainer
from pocketzo.train.tuned import write_adapter

__all__ = [
    "BACKPROPAGATION",
    "BEGINNING",
    "STEPS",
    "Answer",
    "Examined",
    "NotesOutcome",
    "Recorded",
    "examine",
    "run_notes",
]

PAGE: Final = Path(__file__).with_name("notes.jsonl")
QUESTIONS: Final = Path(__file__).with_name("notes_questions.jsonl")
ADAPTERS: Final[dict[Format, tuple[str, ...]]] = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "gguf": ("adapter.gguf",),
    "onnx": (MODEL, GENERATE, WEIGHTS, ADAPTER, "adapter.onnx_adapter"),
}
"""The files that are written for each library; the last has the matrices."""
FOLDERS: Final = {"base": FILES, "run": (METRICS, PLOT, JOURNAL)} | {
    f"adapter-{kind}": files for kind, files in ADAPTERS.items()
}
"""The folders that the demo writes, and the files in them."""

# Chosen by the loss on the page; nobody looked at the questions before.
TRAIN: Final = "lora:train=B"
BATCH_SIZE: Final = 16  # the whole page
STEPS: Final = 150
LR: Final = 2e-2
EPS: Final = 1e-2

BEGINNING: Final = "Pemberly"
"""A note begins with it; the demo has the model continue it."""


@dataclass(frozen=True)
class Recorded:
    """What another way of training reached on the same page.

    Attributes
    ----------
    page, answers : float
        Perplexity.
    right : int
        Number of questions whose answer begins as expected.
    steps : int
    peak : int
        Peak memory while training, in bytes.
    """

    page: float
    answers: float
    right: int
    steps: int
    peak: int


BACKPROPAGATION: Final = Recorded(page=5.9299, answers=4325.5, right=0, steps=30, peak=1902964736)
"""AdamW with the gradients of the same matrices, of the model in float32: bench/results/notes.json."""


@dataclass(frozen=True)
class Answer:
    """A question about the notes, the answer that they give, and the model's before and after training."""

    question: str
    expected: str
    before: str
    after: str

    @property
    def right(self) -> tuple[bool, bool]:
        """Whether the model's text begins with the answer, before and after."""
        return self.before.startswith(self.expected), self.after.startswith(self.expected)


@dataclass(frozen=True)
class NotesOutcome:
    """Results of the demo; of a pair, the first is before training and the second after.

    Attributes
    ----------
    page : tuple of float
        Perplexity of the page, which is what is trained on.
    answers : tuple of float
        Perplexity of the right answers to the questions, which are held out.
    questions : tuple of Answer
        All questions, in the order of the file.
    continued : tuple of str
        How the model continues :data:`BEGINNING`.
    seconds, training_seconds : float
        Wall time of the whole demo, and of training alone.
    forwards : int
        Forward passes of training.
    trained : int
        Number of trained parameters.
    peak : int or None
        Peak memory of the process during training, in bytes.
    journal : int
        Size of the journal in bytes.
    adapters : dict of str to int
        By the format, the size of the adapter in bytes.
    """

    page: tuple[float, float]
    answers: tuple[float, float]
    questions: tuple[Answer, ...]
    continued: tuple[str, str]
    seconds: float
    training_seconds: float
    forwards: int
    trained: int
    peak: int | None
    journal: int
    adapters: dict[str, int]


def run_notes(
    output: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    steps: int = STEPS,
    seed: int = 0,
    say: Callable[[str], None] = print,
    fit: Callable[[Trainer], object] = Trainer.fit,
) -> NotesOutcome | None:
    """Run the demo.

    Parameters
    ----------
    output : path-like
        Folder for the bundle ``base``, the run ``run`` and the adapters ``adapter-*``; those of an earlier demo are
        replaced.
    checkpoint : path-like, optional
        The GGUF file, see :func:`pocketzo.demo.smollm2.find_gguf`.
    steps : int
        Training steps, of 2 forward passes each.
    seed : int
        Seed of training.
    say : callable
        Called with a line of text at the beginning of each stage.
    fit : callable
        Replaces ``Trainer.fit``, for example to display progress.

    Returns
    -------
    NotesOutcome or None
        None if ``fit`` ended before the last step.

    Raises
    ------
    Error
        ``output`` holds something else, or the weights are not available.
    MissingExtraError
        The extra 'export' is not installed.
    """
    started = time.perf_counter()
    output = Path(output)
    check_integer("steps", steps, 1)
    refuse_foreign(output, FOLDERS)
    _require_export()
    weights = find_gguf(checkpoint)
    say(f"weights: {weights}")
    remove_earlier(output, FOLDERS)
    with scratch_folder(output) as scratch:
        graph = scratch / "model.onnx"
        say("exporting to ONNX, with the 4-bit blocks of the file")
        _export(weights, graph)
        bundle = prepare(graph, output / "base", task="causal-lm", train=TRAIN)

    page, questions = load_dataset(PAGE, bundle), load_dataset(QUESTIONS, bundle)
    model = load(bundle, batch=page.batch(np.arange(BATCH_SIZE)))
    trained = sum(math.prod(tensor.shape) for tensor in bundle.tensors if tensor.trainable)
    say(
        f"prepared: {output / 'base'}; --train {TRAIN} adds {trained:,} parameters, and all others are frozen; "
        f"{kernels.isa()} kernels, {model.threads} thread{'s' if model.threads > 1 else ''}"
    )
    before = examine(model, questions)
    # A fresh model, as one that generates holds a second session, which training does not need.
    threads = model.threads
    del model
    trim_heap()
    model = load(bundle, threads=threads)
    optimizer = Momentum(model, lr=LR, eps=EPS, seed=seed, schedule=Schedule("linear", steps))
    trainer = Trainer(
        model,
        optimizer,
        page,
        eval=page,
        batch_size=BATCH_SIZE,
        steps=steps,
        run=output / "run",
        eval_every=max(1, steps // 3),
        source=Source(train=os.fspath(PAGE), eval=os.fspath(PAGE)),
    )
    trainer.rehearse()
    perplexity = trainer.evaluations[0]["perplexity"]
    assert perplexity is not None
    say(f"data: a page of {len(page)} notes, perplexity {perplexity:.1f}; {len(questions)} questions held out")
    say(f"training: {steps} steps of {optimizer.forwards} forward passes and no backward pass")
    reset_peak()
    training = time.perf_counter()
    fit(trainer)
    training_seconds = time.perf_counter() - training
    peak = process_memory()[1]
    if optimizer.step_number < steps:
        return None

    tuned = evaluate(model, page)["perplexity"]
    after = examine(model, questions)
    adapters: dict[str, int] = {}
    for kind, (*_, file) in ADAPTERS.items():
        source = weights if kind == "gguf" else None
        write_adapter(output / "run", output / f"adapter-{kind}", kind=kind, checkpoint=source)
        adapters[kind] = (output / f"adapter-{kind}" / file).stat().st_size
    return NotesOutcome(
        page=(perplexity, tuned),
        answers=(before.perplexity, after.perplexity),
        questions=tuple(
            Answer(question, expected, early, late)
            for question, (expected, early), (_, late) in zip(_asked(), before.answers, after.answers, strict=True)
        ),
        continued=(before.continued, after.continued),
        seconds=time.perf_counter() - started,
        training_seconds=training_seconds,
        forwards=steps * optimizer.forwards,
        trained=trained,
        peak=peak,
        journal=(output / "run" / JOURNAL).stat().st_size,
        adapters=adapters,
    )


@dataclass(frozen=True)
class Examined:
    """What a model knows about the notes.

    Attributes
    ----------
    perplexity : float
        Of the right answers to the questions.
    answers : tuple of tuple of str
        For each question, the right answer and the model's own.
    continued : str
        How the model continues :data:`BEGINNING`.
    """

    perplexity: float
    answers: tuple[tuple[str, str], ...]
    continued: str

    @property
    def right(self) -> int:
        """Number of answers that begin as expected."""
        return sum(got.startswith(expected) for expected, got in self.answers)


def examine(model: Model, questions: Dataset) -> Examined:
    """Ask a model the questions, and have it continue a line of the page."""
    answers = tuple((one.expected, one.got) for one in complete(model, questions))
    return Examined(
        perplexity=evaluate(model, questions)["perplexity"],
        answers=answers,
        continued=model.generate(BEGINNING, max_tokens=16),
    )


def _asked() -> list[str]:
    """Return the questions without the words around them."""
    prompts = (json.loads(line)["prompt"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines())
    return [prompt.removeprefix("Question: ").removesuffix("\nAnswer:") for prompt in prompts]


def _require_export() -> None:
    """Raise MissingExtraError if a package of the extra is missing; none is imported, as they take much memory."""
    for package in EXTRAS["export"]:
        if version(package) is None:
            raise MissingExtraError(package, "export")


def _export(weights: Path, graph: Path) -> None:
    """Export in a process of its own: torch and transformers take more memory than training does."""
    command = [
        sys.executable,
        "-m",
        "pocketzo",
        "export",
        os.fspath(weights),
        "-o",
        os.fspath(graph),
        "--dtype",
        "int4",
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise Error(f"pocketzo export failed: {lines[-1].removeprefix('pocketzo: error: ')}")
