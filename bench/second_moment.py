"""Whether momentum gains by Adam's second moment: loss on a page of text after the same forward passes.

    python bench/second_moment.py BUNDLE [--lrs 1e-2 2e-2 4e-2] [--steps 150] [--seeds 0 1 2] [--json FILE]

BUNDLE is SmolLM2 as `pocketzo demo notes` leaves it in ``base``; the page is the demo's, all of it in each step. Both
ways take MeZO's estimates g z, along the same directions, with eps 1e-2 and a learning rate that falls linearly to 0:

    momentum       m = 0.9 m + 0.1 g z / rms(g), as ``--method momentum``; w -= lr m
    second moment  m = 0.9 m + 0.1 g z, v = 0.99 v + 0.01 (g z)^2, both with Adam's correction; w -= lr m / sqrt(v)

All of it in numpy: no kernel has a second moment. Of each way the rate with the lowest loss for the first seed is run
with the other seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from machine import Run
from tables import second_moment_table

import pocketzo as pz
from pocketzo.demo import notes
from pocketzo.tasks.objective import Objective, metric_objective
from pocketzo.tasks.registry import task_of

EPS, FIRST, SECOND = 1e-2, 0.9, 0.99
WAYS = ("momentum", "second moment")


class Page:
    """The loss of a page, by the trained numbers as one vector."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model = pz.load(path, threads=threads)
        bundle = self.model.bundle
        self.objective = Objective(metric_objective("loss", bundle), task_of(bundle), None)
        data = pz.load_dataset(notes.PAGE, bundle)
        self.batch = data.batch(np.arange(len(data)))
        self.trained = [tensor for tensor in bundle.tensors if tensor.trainable]
        self.ends = np.cumsum([int(np.prod(tensor.shape)) for tensor in self.trained])[:-1]
        self.start = np.concatenate([self.model.weights[tensor.name].ravel() for tensor in self.trained])

    def __call__(self, weights: Any) -> float:
        for tensor, part in zip(self.trained, np.split(weights, self.ends), strict=True):
            self.model.weights[tensor.name] = part.astype(np.float32).reshape(tensor.shape)
        return self.objective(self.model, self.batch)

    def direction(self, seed: int, draw: int) -> Any:
        parts = [
            pz.kernels.noise(int(np.prod(tensor.shape)), seed=seed, tensor=tensor.id, draw=draw)
            for tensor in self.trained
        ]
        return np.concatenate(parts).astype(np.float64)


def trained(page: Page, way: str, lr: float, steps: int, seed: int) -> float:
    """Return the loss after some steps."""
    w = page.start.astype(np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    square = weight = 0.0
    for step in range(steps):
        z = page.direction(seed, step)
        g = (page(w + EPS * z) - page(w - EPS * z)) / (2 * EPS)
        rate = lr * (1 - step / steps)
        weight = SECOND * weight + 1 - SECOND
        if way == "momentum":
            square = SECOND * square + (1 - SECOND) * g * g
            m = FIRST * m + (1 - FIRST) * g / np.sqrt(square / weight) * z
            w -= rate * m
        else:
            m = FIRST * m + (1 - FIRST) * g * z
            v = SECOND * v + (1 - SECOND) * (g * z) ** 2
            w -= rate * (m / (1 - FIRST ** (step + 1))) / (np.sqrt(v / weight) + 1e-12)
    return page(w)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-2, 2e-2, 4e-2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run, page = Run(), Page(arguments.bundle, arguments.threads)
    first, *others = arguments.seeds
    rows: list[dict[str, Any]] = []

    def measure(way: str, lr: float, seed: int) -> None:
        loss = trained(page, way, lr, arguments.steps, seed)
        rows.append({"way": way, "lr": lr, "seed": seed, "loss": loss})
        print(rows[-1], file=sys.stderr, flush=True)

    start = page(page.start)
    for way in WAYS:
        for lr in arguments.lrs:
            measure(way, lr, first)
    for way in WAYS:
        best = min((row for row in rows if row["way"] == way and row["seed"] == first), key=lambda row: row["loss"])
        for seed in others:
            measure(way, best["lr"], seed)
    about = {"start": start, "steps": arguments.steps, "numbers": page.start.size}
    print("\n".join(second_moment_table(run.finish({**about, "rows": rows}, arguments.json))))


if __name__ == "__main__":
    main()
