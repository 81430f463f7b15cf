"""The bits of the methods' steps, by another way: cd tests && python -m pinned.

Ten steps of each method with every pass done by itself, tensor after tensor, as the papers, cpp/SPEC.md and
docs/formats.md have it, on numpy arrays and the public kernels alone. test_optim.py compares what the optimizers do;
the hashes of MeZO and FZOO that it holds were first recorded with version 0.1.0, before there were passes that are
merged or left to the next step.
"""

from __future__ import annotations

import hashlib
import math
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pocketzo as pz

MODEL = Path(__file__).parent / "models" / "bert-new.onnx"
SEED, STEPS = 5, 10
DECAY = 0.1
GROUP = pz.ParamGroup("classifier", lr=10, eps=3)
LR = {"mezo": 1e-5, "fzoo": 1e-3, "momentum": 1e-3}
QUERIES = {"mezo": 1, "fzoo": 3, "momentum": 2}
DISTRIBUTION: Mapping[str, Any] = {"mezo": "gaussian", "fzoo": "rademacher", "momentum": "gaussian"}
EPS = 1e-3

Weights = dict[str, NDArray[np.float32]]


def content(weights: Mapping[str, NDArray[Any]]) -> bytes:
    return b"".join(weights[name].tobytes() for name in sorted(weights))


def checksum(weights: Mapping[str, NDArray[Any]]) -> float:
    """A loss that is the same on every machine, and another one for every bit."""
    return zlib.crc32(content(weights)) / 2**32


class Reference:
    """Weights, and passes over them, one call of a kernel each."""

    def __init__(self, bundle: pz.Bundle, method: str) -> None:
        model = pz.load(bundle, threads=1)
        self.weights: Weights = {name: model.weights[name].copy() for name in model.weights}
        self.ids = {tensor.name: tensor.id for tensor in bundle.tensors}
        self.noise: dict[str, Any] = {"seed": SEED, "distribution": DISTRIBUTION[method]}
        self.trained = [tensor.name for tensor in bundle.tensors if tensor.trainable]

    def each(self) -> Iterator[tuple[NDArray[np.float32], int, pz.ParamGroup]]:
        for name in self.trained:
            yield self.weights[name], self.ids[name], GROUP if GROUP.pattern in name else pz.ParamGroup("")

    def shift(self, draw: int, factor: float) -> float:
        """Shift by a multiple of eps, and return the loss there."""
        for w, tensor, group in self.each():
            eps = float(np.float32(EPS * group.eps))
            pz.kernels.perturb(w, tensor=tensor, draw=draw, scale=float(np.float32(factor * eps)), **self.noise)
        return checksum(self.weights)

    def update(self, coefficients: Mapping[int, float], lr: float, back: float = 0.0) -> None:
        """Subtract the multiples of the directions; the first also returns from ``back`` times eps, in one rounding."""
        for w, tensor, group in self.each():
            eps = float(np.float32(EPS * group.eps))
            for draw, coefficient in coefficients.items():
                scale = back * eps - group.lr * coefficient if back else -group.lr * coefficient
                pz.kernels.perturb(w, tensor=tensor, draw=draw, scale=float(np.float32(scale)), **self.noise)
            self.decay(w, group, lr)

    def decay(self, w: NDArray[np.float32], group: pz.ParamGroup, lr: float) -> None:
        if w.ndim > 1:
            w[...] = fma(-np.float32(lr * group.lr * DECAY), w, w)


def fma(a: np.float32, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """By way of float64: the product is exact there, and so is the sum but for a second rounding."""
    return (np.float64(a) * x.astype(np.float64) + y.astype(np.float64)).astype(np.float32)


def mezo(reference: Reference) -> list[float]:
    found: list[float] = []
    lr = float(np.float32(LR["mezo"]))
    for draw in range(STEPS):
        plus = reference.shift(draw, 1.0)
        minus = reference.shift(draw, -2.0)
        coefficient = float(np.float32(lr * (plus - minus) / (2 * EPS)))
        reference.update({draw: coefficient}, lr, back=1.0)
        found.append(coefficient)
    return found


def fzoo(reference: Reference) -> list[float]:
    found: list[float] = []
    lr, n = float(np.float32(LR["fzoo"])), QUERIES["fzoo"]
    for step in range(STEPS):
        base = checksum(reference.weights)
        losses = {}
        for draw in range(n * step, n * (step + 1)):
            losses[draw] = reference.shift(draw, 1.0)
            reference.shift(draw, -1.0)
        spread = math.sqrt(sum((loss - sum(losses.values()) / n) ** 2 for loss in losses.values()) / (n - 1))
        coefficients = {draw: float(np.float32(lr * (loss - base) / (n * spread))) for draw, loss in losses.items()}
        reference.update(coefficients, lr)
        found += coefficients.values()
    return found


def momentum(reference: Reference) -> list[float]:
    found: list[float] = []
    lr, n = float(np.float32(LR["momentum"])), QUERIES["momentum"]
    m = {tensor: np.zeros_like(w) for w, tensor, _ in reference.each()}
    square = weight = 0.0
    for step in range(STEPS):
        coefficients = {}
        for draw in range(n * step, n * (step + 1)):
            plus, minus = reference.shift(draw, 1.0), reference.shift(draw, -2.0)
            coefficients[draw] = float(np.float32(lr * (plus - minus) / (2 * EPS * n)))
            reference.shift(draw, 1.0)
        slopes = {draw: n * value / lr for draw, value in coefficients.items()}
        first, second = slopes.values()
        square, weight = 0.99 * square + 0.01 * ((first * first + second * second) / n), 0.99 * weight + 0.01
        rms = math.sqrt(square / weight)
        for w, tensor, group in reference.each():
            m[tensor][...] = fma(-np.float32(1 - 0.9), m[tensor], m[tensor])
            for draw, slope in slopes.items():
                gain = float(np.float32((1 - 0.9) * (slope / rms) / n))
                pz.kernels.perturb(m[tensor], tensor=tensor, draw=draw, scale=gain, **reference.noise)
            w[...] = fma(np.float32(-group.lr * lr), m[tensor], w)
            reference.decay(w, group, lr)
        found += coefficients.values()
    return found


METHODS: dict[str, Callable[[Reference], list[float]]] = {"mezo": mezo, "fzoo": fzoo, "momentum": momentum}


def hashes(weights: Mapping[str, NDArray[Any]], coefficients: list[float]) -> tuple[str, str]:
    """SHA-256 of the weights, by sorted name, and of the coefficients as little-endian float32."""
    numbers = np.array(coefficients, "<f4").tobytes()
    return hashlib.sha256(content(weights)).hexdigest(), hashlib.sha256(numbers).hexdigest()


def compute(bundle: pz.Bundle, method: str) -> tuple[str, str]:
    reference = Reference(bundle, method)
    coefficients = METHODS[method](reference)
    return hashes(reference.weights, coefficients)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        bundle = pz.prepare(MODEL, Path(folder) / "bundle")
        for name in METHODS:
            print(name, *compute(bundle, name), file=sys.stdout)
