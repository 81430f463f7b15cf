"""SST-2 from a zero head on all-MiniLM-L6-v2, every parameter trained by FZOO: accuracy on dev, forwards and time.

    python bench/sst2.py [SST2_FOLDER] [--threads 2] [--seed 0] [--json FILE]

The folder (default: the environment variable SST2) has train.tsv and dev.tsv: sentence, tab, 0 or 1. Both are read
whole first, which checks the reader and the tokenizer on real data.

Trains on 1,024 sentences of train.tsv (512 a class, drawn by seed 0). First the head alone: the body does not move
meanwhile, so its embeddings of the training sentences are computed once (32 forwards of 32) and each evaluation of the
objective is one small matrix product in numpy. Then all parameters, every evaluation a forward through the graph. The
row after the head is a regularised linear probe found without a gradient: what comes below it is the body's share.

dev is only reported. The settings were chosen on 1,000 other sentences of train.tsv; --held-out reports on those.
Seconds are those of training, without loading and evaluating.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine, write
from numpy.typing import NDArray

import pocketzo as pz
from pocketzo.demo import minilm
from pocketzo.export.bert import build_onnx

SST2 = Path(os.environ.get("SST2") or "sst2")
SENTENCES = {"train": (6_920, 3_610), "dev": (872, 444)}  # how many, and how many of them positive
CLS, SEP = 101, 102  # the tokens that begin and end a sentence
PER_CLASS = 512
BATCH = 32
DIRECTIONS = 16
HEAD_STEPS = 1_000
EVERY = 1_000  # forwards between two lines of the table

# A direction's noise reaches the loss through every weight that it moves, its signal only through those that the task
# wants moved. |gradient|^2 / curvature by tensor, measured once by backpropagation on the training sentences, is lowest
# for the embeddings and the outer layers.
BODY = (
    pz.ParamGroup(r"^classifier", lr=0.5, eps=0.5),
    pz.ParamGroup(r"^embeddings", lr=0.03, eps=0.03),
    pz.ParamGroup(r"layer\.[05]\.", lr=0.3, eps=0.3),
)


class Batches:
    """Training data whose items are whole batches: as many sentences of each class, all of about the same length.

    Equal numbers take the chance surplus of one class out of the loss, similar lengths the padding out of the cost.
    """

    def __init__(self, data: pz.Dataset, *, seed: int, epochs: int = 16) -> None:
        assert data.label_ids is not None
        assert data.lengths is not None
        self.data = data
        random = np.random.default_rng(seed)
        items = []
        for _ in range(epochs):
            halves = []
            for label in (0, 1):
                chosen = np.flatnonzero(data.label_ids == label)
                # so that sentences meet others in every epoch
                near = data.lengths[chosen] + random.normal(0, 2, len(chosen))
                halves.append(chosen[np.argsort(near)].reshape(-1, BATCH // 2))
            items.append(np.concatenate(halves, axis=1))
        self.items: NDArray[np.int64] = np.concatenate(items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.data.fingerprint.encode() + self.items.astype("<i8").tobytes()).hexdigest()

    def batch(self, indices: NDArray[np.int64]) -> pz.Batch:
        return self.data.batch(self.items[indices].ravel())


def read_whole(folder: Path, name: str, bundle: pz.Bundle) -> pz.Dataset:
    """Read a file of SST-2, and exit where the data set is not what SST-2 must give."""
    data = pz.load_dataset(folder / f"{name}.tsv", bundle)
    assert data.label_ids is not None
    if (got := (len(data), int(data.label_ids.sum()))) != SENTENCES[name]:
        sys.exit(f"{folder}: {name}.tsv must have (sentences, positive ones) {SENTENCES[name]}, got {got}")
    batch = data.batch(np.arange(32))
    last = batch["input_ids"][np.arange(32), batch["attention_mask"].sum(axis=1) - 1]
    if (batch["input_ids"][:, 0] != CLS).any() or (last != SEP).any():
        sys.exit(f"{folder}: the sentences of {name}.tsv must begin with token {CLS} and end with {SEP}")
    return data


def subset(source: Path, chosen: NDArray[np.int64], out: Path) -> Path:
    """Write some of a file's lines to another."""
    lines = source.read_text(encoding="utf-8").splitlines()
    out.write_text("".join(f"{lines[index]}\n" for index in chosen), encoding="utf-8")
    return out


def split(train: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the 1,024 training lines and of 1,000 others."""
    labels = np.array([int(line.rsplit("\t", 1)[1]) for line in train.read_text(encoding="utf-8").splitlines()])
    random = np.random.default_rng(0)
    chosen = np.concatenate([random.permutation(np.flatnonzero(labels == label))[:PER_CLASS] for label in (0, 1)])
    others = random.permutation(np.setdiff1d(np.arange(len(labels)), chosen))[:1_000]
    return chosen, others


class Report:
    """Prints a line of the table at every evaluation, and keeps it."""

    def __init__(self, on: str) -> None:
        self.on = on
        self.rows: list[dict[str, Any]] = []
        self.forwards = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        print(f"| forwards of {BATCH} | seconds | training loss | {on} accuracy | |")
        print("|---|---|---|---|---|", flush=True)

    def row(self, accuracy: float, note: str = "") -> None:
        loss = float(np.mean(self.losses)) if self.losses else None
        row = {"forwards": self.forwards, "seconds": self.seconds, "loss": loss, "accuracy": accuracy, "note": note}
        self.rows.append(row)
        self.losses = []
        shown = "-" if loss is None else f"{loss:.3f}"
        print(f"| {self.forwards:,} | {self.seconds:.0f} | {shown} | {accuracy:.1%} | {note} |", flush=True)

    def step(self, progress: pz.Progress) -> None:
        self.forwards += len(progress.info.losses)
        self.seconds += progress.seconds
        self.losses.append(progress.info.loss)
        if progress.evaluation is not None:
            self.row(progress.evaluation["accuracy"])


def train_head(model: pz.Model, data: pz.Dataset, *, lr: float, decay: float, steps: int, seed: int) -> None:
    """Train the head alone on the embeddings of all training sentences, which do not change meanwhile."""
    assert data.label_ids is not None
    sign = np.where(data.label_ids == 1, -1, 1)
    features = embeddings(model, data)

    def loss(model: pz.Model) -> float:
        logits = features @ model.weights["classifier.weight"] + model.weights["classifier.bias"]
        return float(np.logaddexp(0, sign * (logits[:, 1] - logits[:, 0])).mean())

    optimizer = pz.FZOO(
        model,
        lr=lr,
        queries=DIRECTIONS,
        seed=seed,
        weight_decay=decay,
        trainable="^classifier",
        schedule=pz.Schedule("linear", steps=steps),
    )
    for _ in range(steps):
        optimizer.step(loss)


def embeddings(model: pz.Model, data: pz.Dataset) -> NDArray[np.float32]:
    assert data.lengths is not None
    result = np.empty((len(data), model.weights["classifier.weight"].shape[0]), np.float32)
    order = np.argsort(data.lengths, kind="stable")
    for at in range(0, len(data), BATCH):
        chosen = order[at : at + BATCH]
        result[chosen] = model.run(data.batch(chosen), ["embedding"])["embedding"]
    return result


def train_all(
    model: pz.Model, batches: Batches, evaluated: pz.Dataset, report: Report, *, lr: float, steps: int, seed: int
) -> None:
    optimizer = pz.FZOO(
        model,
        lr=lr,
        eps=3e-4,
        queries=DIRECTIONS,
        seed=seed,
        groups=BODY,
        schedule=pz.Schedule("linear", steps=steps),
    )
    trainer = pz.Trainer(
        model,
        optimizer,
        batches,
        eval=evaluated,
        batch_size=1,
        steps=steps,
        eval_every=round(EVERY / optimizer.forwards),
        callback=report.step,
    )
    trainer.fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=SST2, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--checkpoint", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the directions and the batches")
    parser.add_argument("--forwards", type=int, default=6_000, help="of the second stage")
    parser.add_argument("--lr", type=float, default=0.005, help="of the second stage")
    parser.add_argument("--held-out", action="store_true", help="report on unused sentences of train.tsv, not on dev")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not (arguments.data / "train.tsv").is_file():
        sys.exit(f"{arguments.data}: no train.tsv here; SST-2 is not part of this project, give the folder that has it")

    pz.kernels.set_threads(arguments.threads)
    print(f"{machine()}\n")
    checkpoint = minilm.find_checkpoint(arguments.checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_onnx(checkpoint, folder / "model.onnx", num_labels=2)
        bundle = pz.prepare(
            folder / "model.onnx", folder / "bundle", tokenizer=checkpoint.tokenizer, labels=("0", "1"), max_length=128
        )
        read_whole(arguments.data, "train", bundle)
        dev = read_whole(arguments.data, "dev", bundle)
        chosen, others = split(arguments.data / "train.tsv")
        training = pz.load_dataset(subset(arguments.data / "train.tsv", chosen, folder / "train.tsv"), bundle)
        evaluated = dev
        if arguments.held_out:
            evaluated = pz.load_dataset(subset(arguments.data / "train.tsv", others, folder / "held-out.tsv"), bundle)
        model = pz.load(bundle, threads=arguments.threads)
        batches = Batches(training, seed=arguments.seed)
        report = Report("held-out" if arguments.held_out else "dev")
        report.row(pz.evaluate(model, evaluated)["accuracy"], "zero head")

        began = time.perf_counter()
        train_head(model, training, lr=0.02, decay=1.0, steps=HEAD_STEPS, seed=2 * arguments.seed)
        report.seconds += time.perf_counter() - began
        report.forwards += len(training) // BATCH
        report.row(
            pz.evaluate(model, evaluated)["accuracy"], f"head trained, {HEAD_STEPS * (DIRECTIONS + 1):,} evaluations"
        )

        steps = arguments.forwards // (DIRECTIONS + 1)
        train_all(model, batches, evaluated, report, lr=arguments.lr, steps=steps, seed=2 * arguments.seed + 1)
        trained = pz.evaluate(model, training)
    print(f"\naccuracy on the 1,024 training sentences: {trained['accuracy']:.1%}, loss {trained['loss']:.3f}")
    settings = {
        "directions": DIRECTIONS,
        "batch": BATCH,
        "body": [asdict(group) for group in BODY],
        **{name: str(value) for name, value in vars(arguments).items()},
    }
    write(
        arguments.json,
        {"settings": settings, "on": report.on, "rows": report.rows, "training_sentences": trained},
    )


if __name__ == "__main__":
    main()
