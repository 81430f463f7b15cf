"""FwdLLM's levers at equal forward passes: pacing by variance, and the choice among candidate directions.

    python bench/levers.py [--task messages|sst2] [--train head|bias+head|lora+head] [--forwards N] [--json FILE]

all-MiniLM-L6-v2 learns the demo's messages, or SST-2 from the 1,024 training sentences of sst2.py (the environment
variable SST2 names its folder), from a zero head. With --train head, the body does not move, so that its embeddings are
computed once, and a "forward pass" is one of the head. Each arm ends when its forward passes are used up; computing
cosines takes none. Its learning rate is that of the grid with the lowest loss on the training data with seed 0; the
figures are of the other seeds. What is held out is reported alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from machine import Run
from numpy.typing import NDArray
from sst2 import SST2, embeddings, split, subset
from tables import levers_table

import pocketzo as pz
from pocketzo.data.order import Order
from pocketzo.demo import minilm
from pocketzo.demo.run import LABELS, messages
from pocketzo.export.bert import build_onnx

Row = dict[str, Any]
BATCH = 16
START: dict[str, NDArray[Any]] = {}  # the trained weights
RATES = {"mezo": 3e-3, "momentum": 1e-2, "fzoo": 3e-3}  # the middle of the grid
METHODS: Mapping[str, type[pz.Optimizer]] = {"mezo": pz.MeZO, "momentum": pz.Momentum, "fzoo": pz.FZOO}
ARMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mezo, 1 direction": ("mezo", {}),
    "mezo, 4 directions": ("mezo", {"queries": 4}),
    "mezo, pace 0.5": ("mezo", {"pace": pz.Pace(0.5)}),
    "mezo, 1 of 10 candidates": ("mezo", {"candidates": 10}),
    "mezo, pace 0.5, 1 of 10": ("mezo", {"pace": pz.Pace(0.5), "candidates": 10}),
    "momentum, 1 direction": ("momentum", {}),
    "momentum, 4 directions": ("momentum", {"queries": 4}),
    "momentum, pace 0.5": ("momentum", {"pace": pz.Pace(0.5)}),
    "momentum, 1 of 10 candidates": ("momentum", {"candidates": 10}),
    "fzoo, 8 directions": ("fzoo", {}),
    "fzoo, 8 of 80 candidates": ("fzoo", {"candidates": 80}),
}


class Through:
    """Losses by the whole model."""

    def __init__(self, data: pz.Dataset, held_out: pz.Dataset) -> None:
        self.data = data
        self.held_out = held_out

    def objective(self, chosen: NDArray[np.int64]) -> Callable[[pz.Model], float]:
        batch = self.data.batch(chosen)
        return lambda model: model.loss(batch)

    def evaluate(self, model: pz.Model) -> dict[str, float]:
        after, held = pz.evaluate(model, self.data), pz.evaluate(model, self.held_out)
        return {"training_loss": after["loss"], "loss": held["loss"], "accuracy": held["accuracy"]}


class Head:
    """Losses by the head alone, on embeddings that do not move."""

    def __init__(self, model: pz.Model, data: pz.Dataset, held_out: pz.Dataset) -> None:
        self.features = embeddings(model, data), embeddings(model, held_out)
        self.labels = data.label_ids, held_out.label_ids

    def _losses(
        self, model: pz.Model, part: int, chosen: NDArray[np.int64] | slice
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        labels = self.labels[part]
        assert labels is not None
        logits = self.features[part][chosen] @ model.weights["classifier.weight"] + model.weights["classifier.bias"]
        logits -= logits.max(axis=1, keepdims=True)
        own = np.take_along_axis(logits, labels[chosen][:, None], 1)[:, 0]
        return np.log(np.exp(logits).sum(axis=1)) - own, logits.argmax(axis=1) == labels[chosen]

    def objective(self, chosen: NDArray[np.int64]) -> Callable[[pz.Model], float]:
        return lambda model: float(self._losses(model, 0, chosen)[0].mean())

    def evaluate(self, model: pz.Model) -> dict[str, float]:
        after, _ = self._losses(model, 0, slice(None))
        held, right = self._losses(model, 1, slice(None))
        return {"training_loss": float(after.mean()), "loss": float(held.mean()), "accuracy": float(right.mean())}


def run(model: pz.Model, task: Through | Head, size: int, arm: str, lr: float, seed: int, forwards: int) -> Row:
    """Train by one arm, and evaluate."""
    method, lever = ARMS[arm]
    for tensor in model.bundle.tensors:
        if tensor.trainable:
            model.weights[tensor.name] = START[tensor.name]
    optimizer = METHODS[method](model, lr=lr, seed=seed, **lever)
    order = Order(seed=seed, size=size, batch_size=BATCH)
    used = directions = steps = 0
    began = time.process_time()
    while used < forwards:
        info = optimizer.step(task.objective(order(steps)))
        used, directions, steps = used + len(info.losses), directions + len(info.coefficients), steps + 1
    seconds = time.process_time() - began
    found = {"arm": arm, "lr": lr, "seed": seed, "steps": steps, "directions": directions / steps}
    return {**found, **task.evaluate(model), "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["messages", "sst2"], default="messages")
    parser.add_argument("--train", default="bias+head", help="the trained set, as prepare takes it")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--checkpoint", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--forwards", type=int, default=2_000, help="of each run, each of a batch of 16")
    parser.add_argument("--rates", type=int, default=5, help="learning rates of the grid, each 3 times the one before")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured = Run()
    pz.kernels.set_threads(arguments.threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = minilm.find_checkpoint(arguments.checkpoint)
        labels = LABELS if arguments.task == "messages" else ("0", "1")
        build_onnx(checkpoint, folder / "model.onnx", num_labels=len(labels))
        bundle = pz.prepare(
            folder / "model.onnx",
            folder / "bundle",
            tokenizer=checkpoint.tokenizer,
            labels=labels,
            max_length=64,
            train=arguments.train,
        )
        files = messages("train"), messages("test")
        if arguments.task == "sst2":
            chosen, _ = split(SST2 / "train.tsv")
            files = subset(SST2 / "train.tsv", chosen, folder / "train.tsv"), SST2 / "dev.tsv"
        data, held_out = (pz.load_dataset(file, bundle) for file in files)
        model = pz.load(bundle, threads=arguments.threads)
        START.update({tensor.name: model.weights[tensor.name].copy() for tensor in bundle.tensors if tensor.trainable})
        parameters = sum(start.size for start in START.values())
        task = Head(model, data, held_out) if arguments.train == "head" else Through(data, held_out)
        for arm in arguments.arms:
            rates = [RATES[ARMS[arm][0]] * 3.0 ** (i - arguments.rates // 2) for i in range(arguments.rates)]
            tried = [run(model, task, len(data), arm, lr, 0, arguments.forwards) for lr in rates]
            lr = min(tried, key=lambda row: (math.isnan(row["training_loss"]), row["training_loss"]))["lr"]
            seeds = range(1, arguments.seeds + 1)
            rows += [run(model, task, len(data), arm, lr, seed, arguments.forwards) for seed in seeds]
            print(f"{arm}: measured", file=sys.stderr, flush=True)
    settings = {name: getattr(arguments, name) for name in ("task", "train", "forwards", "seeds", "rates")}
    results = {"rows": rows, "parameters": parameters, "settings": settings}
    print("\n".join(levers_table(measured.finish(results, arguments.json))))


if __name__ == "__main__":
    main()
