"""Models with random weights in the shapes of well-known encoders, made without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import pocketzo as pz
from pocketzo.demo.minilm import Checkpoint, build_onnx
from pocketzo.safetensors import write


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int = 512


SHAPES = {
    "minilm": Shape(6, 12, 384, 1536, 30522),
    "bert-base": Shape(12, 12, 768, 3072, 30522),
    "roberta-large": Shape(24, 16, 1024, 4096, 50265),
}


def make_bundle(shape: Shape, folder: Path, *, classes: int = 2) -> Path:
    """Write a bundle with random weights into ``folder`` and return its path."""
    rng = np.random.default_rng(0)

    def normal(*size: int) -> NDArray[np.float32]:
        return rng.standard_normal(size, np.float32) * np.float32(0.02)

    def tensors() -> Iterator[tuple[str, NDArray[np.float32]]]:
        h, i = shape.hidden, shape.intermediate
        yield "embeddings.word_embeddings.weight", normal(shape.vocabulary, h)
        yield "embeddings.position_embeddings.weight", normal(shape.positions, h)
        yield "embeddings.token_type_embeddings.weight", normal(2, h)
        norms = ["embeddings.LayerNorm"]
        for n in range(shape.layers):
            layer = f"encoder.layer.{n}"
            norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
            dense = {f"attention.self.{x}": (h, h) for x in ("query", "key", "value")}
            dense |= {"attention.output.dense": (h, h), "intermediate.dense": (i, h), "output.dense": (h, i)}
            for name, size in dense.items():
                yield f"{layer}.{name}.weight", normal(*size)
                yield f"{layer}.{name}.bias", normal(size[0])
        for name in norms:
            yield f"{name}.weight", np.ones(h, np.float32)
            yield f"{name}.bias", np.zeros(h, np.float32)

    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "random.safetensors"
    write(weights, tensors())
    checkpoint = Checkpoint(weights, folder / "none", shape.layers, shape.heads, shape.hidden)
    build_onnx(checkpoint, folder / "random.onnx", classes)
    weights.unlink()
    pz.prepare(folder / "random.onnx", folder / "bundle")
    (folder / "random.onnx").unlink()
    return folder / "bundle"


def make_batch(batch: int, tokens: int, *, vocabulary: int) -> dict[str, NDArray[np.int64]]:
    """Random tokens, all of them real ones, and labels."""
    rng = np.random.default_rng(1)
    return {
        "input_ids": rng.integers(0, vocabulary, (batch, tokens)),
        "attention_mask": np.ones((batch, tokens), np.int64),
        "token_type_ids": np.zeros((batch, tokens), np.int64),
        "labels": rng.integers(0, 2, batch),
    }
