"""The built-in example: sort phone messages into eight intents by a side head, in about half a minute.

all-MiniLM-L6-v2 runs once over the training messages. The head is fitted to what its layers say, and everything about
it is chosen by cross-validation on the training messages; those that are held out are looked at once. Then zeroth order
learns a metric, macro-F1, on a lopsided part of the same messages, from what was kept of the model.

It prints nothing itself: ``pocketzo demo`` does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketzo.arguments import check_integer
from pocketzo.data.load import load_dataset
from pocketzo.demo.folders import refuse_foreign, remove_earlier
from pocketzo.demo.minilm import find_checkpoint
from pocketzo.demo.run import LABELS, messages, plain_guesses
from pocketzo.export.bert import build_onnx
from pocketzo.formats.bundle import FILES
from pocketzo.formats.staging import scratch_folder
from pocketzo.machine.cores import fast
from pocketzo.prepare import prepare
from pocketzo.train.head.evaluate import evaluate_heads
from pocketzo.train.head.fit import Fit, Fitter, Told
from pocketzo.train.head.kept import Kept
from pocketzo.train.head.run import PARAMETERS, RECORD, HeadRun

FOLDERS: Final = {"base": FILES, "run": (RECORD, PARAMETERS), "tuned": FILES}
"""The folders that the example writes, and the files in them."""
RARE: Final = LABELS[len(LABELS) // 2 :]
EVERY: Final = 4


class Recorded(NamedTuple):
    """What zeroth order over all weights achieved, by `pocketzo demo all-weights`.

    Attributes
    ----------
    accuracy : float
        On the held-out messages.
    forwards, seconds : int
        Forward passes and time of training.
    """

    accuracy: float
    forwards: int
    seconds: int


RECORDED: Final = Recorded(0.743, 2880, 68)


@dataclass(frozen=True)
class HeadOutcome:
    """Results of the example.

    Attributes
    ----------
    fit : Fit
        The head of all messages.
    head, probe : dict
        Results on the held-out messages, and those of a linear probe.
    by_metric : Fit
        The head of the lopsided messages.
    lopsided : tuple of dict
        Results on the lopsided held-out messages: of a linear probe, of the head before, and of the head after zeroth
        order; it is the same where that was left out.
    counts, lopsided_counts : tuple of int
        Messages to learn from, and held out.
    plain : float
        Accuracy of the tuned bundle in plain onnxruntime on the held-out messages.
    examples : tuple of (str, str, str)
        The first held-out message of each label, its label, and the one that it gets.
    layers : int
        Of the encoder.
    seconds : float
        Wall time, in all.
    """

    fit: Fit
    head: dict[str, float]
    probe: dict[str, float]
    by_metric: Fit
    lopsided: tuple[dict[str, float], dict[str, float], dict[str, float]]
    counts: tuple[int, int]
    lopsided_counts: tuple[int, int]
    plain: float
    examples: tuple[tuple[str, str, str], ...]
    layers: int
    seconds: float


def kept_lines(path: Path) -> list[int]:
    """Return the numbers of the lines of a lopsided part: of the last four labels every fourth message."""
    seen = dict.fromkeys(LABELS, 0)
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        label = line.rpartition("\t")[2]
        if label not in RARE or seen[label] % EVERY == 0:
            kept.append(number)
        seen[label] += 1
    return kept


def lopsided(path: Path, out: Path) -> Path:
    """Write the lopsided part of a file of messages, and return where."""
    lines = path.read_text(encoding="utf-8").splitlines()
    out = out.with_suffix(".tsv")
    out.write_text("".join(f"{lines[number]}\n" for number in kept_lines(path)), encoding="utf-8")
    return out


def run_head(
    output: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    steps: int,
    seed: int = 0,
    say: Callable[[str], None] = print,
    told: Told = lambda *_: None,
) -> HeadOutcome:
    """Run the example.

    Parameters
    ----------
    output : path-like
        Folder for the bundles ``base`` and ``tuned`` and the run ``run``; those of an earlier one are replaced.
    checkpoint : path-like, optional
        Folder with ``model.safetensors`` and ``tokenizer.json``, see :func:`pocketzo.demo.minilm.find_checkpoint`.
    steps : int
        Of zeroth order.
    seed : int
        See :func:`pocketzo.train_head`.
    say : callable
        Called with a line of text at the beginning of each stage.
    told : callable
        Reports progress, see :func:`pocketzo.train_head`.

    Raises
    ------
    Error
        ``output`` holds something else, or the checkpoint is not available.
    """
    started = time.perf_counter()
    output = Path(output)
    check_integer("steps", steps, 1)
    refuse_foreign(output, FOLDERS)
    files = find_checkpoint(checkpoint)
    say(f"weights: {files.weights}")
    remove_earlier(output, FOLDERS)
    threads = fast()
    with scratch_folder(output) as scratch:
        graph = scratch / "minilm.onnx"
        build_onnx(files, graph, len(LABELS))
        base = prepare(
            graph, output / "base", task="classification", tokenizer=files.tokenizer, labels=LABELS, max_length=64
        )
        train, test = (load_dataset(messages(part), base) for part in ("train", "test"))
        say(f"prepared: {output / 'base'}; {len(train)} messages to learn from, {len(test)} held out")
        kept = Kept.of(base, train, threads=threads, folder=scratch, told=lambda *done: told("backbone", *done))
        fit = Fitter(base, kept, seed=seed, told=told).fit()
        head, probe = evaluate_heads(base, [fit.head, fit.probe], test, threads=threads)
        run = HeadRun.of(base, fit.head, LABELS, {"seed": seed, "eval": head, "probe_eval": probe})
        run.write(output / "run", fit.head)
        run.write_bundle(fit.head, output / "tuned")

        rows = np.array(kept_lines(messages("train")))
        few = load_dataset(lopsided(messages("test"), scratch / "test"), base)
        say(f"lopsided: {len(rows)} of the messages, a quarter of {', '.join(RARE)}; {len(few)} held out")
        choices = list(dict.fromkeys([fit.trials[0].features, fit.probe_trial.features]))
        by_metric = Fitter(
            base, kept.take(rows), seed=seed, told=told, choices=choices, objective="f1", steps=steps
        ).fit()
        assert by_metric.by_metric is not None, "f1 is no loss"
        heads = [by_metric.probe, by_metric.by_metric.start, by_metric.head]
        evaluated = evaluate_heads(base, heads, few, threads=threads, metrics=["f1"])
    guesses = plain_guesses(output / "tuned" / "model.onnx", test)
    assert test.label_ids is not None
    return HeadOutcome(
        fit=fit,
        head=head,
        probe=probe,
        by_metric=by_metric,
        lopsided=(evaluated[0], evaluated[1], evaluated[2]),
        counts=(len(train), len(test)),
        lopsided_counts=(len(rows), len(few)),
        plain=float(np.mean(guesses == test.label_ids)),
        examples=_examples(test.label_ids, guesses),
        layers=files.layers,
        seconds=time.perf_counter() - started,
    )


def _examples(labels: NDArray[np.int64], guesses: NDArray[np.int64]) -> tuple[tuple[str, str, str], ...]:
    """Return the first message of each label in file order; the predictions do not affect the choice."""
    texts = [line.partition("\t")[0] for line in messages("test").read_text(encoding="utf-8").splitlines()]
    first = [int(np.flatnonzero(labels == label)[0]) for label in range(len(LABELS))]
    return tuple((texts[at], LABELS[labels[at]], LABELS[guesses[at]]) for at in first)
