"""Models in the shapes of well-known ones, with random weights, made without torch.

Packages are imported where they are used, so that they do not count in the memory of step.py's peers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """A BERT encoder with a classifier or, if ``causal``, an OPT decoder with a language model's loss."""

    layers: int
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int = 512
    causal: bool = False


SHAPES = {
    "minilm": Shape(6, 12, 384, 1536, 30522),
    "bert-base": Shape(12, 12, 768, 3072, 30522),
    "roberta-large": Shape(24, 16, 1024, 4096, 50265),
    "xglm-564m": Shape(24, 16, 1024, 4096, 256008, 2050, causal=True),
    "opt-1.3b": Shape(24, 32, 2048, 8192, 50272, 2050, causal=True),
}
OPT_OFFSET = 2  # the first position's row in the table, as in the published models
MASKED = -10_000.0


def make_bundle(name: str, folder: Path, dtype: Literal["float32", "float16"] = "float32") -> Path:
    """Return the bundle of a shape in ``folder``; prepare it if it does not exist."""
    import pocketzo as pz
    from pocketzo.export.bert import Checkpoint, build_onnx
    from pocketzo.formats.safetensors import write

    bundle = folder / (name if dtype == "float32" else f"{name}-{dtype}")
    if bundle.exists():
        return bundle
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    graph, weights = folder / f"{name}.onnx", folder / f"{name}.random"
    try:
        if shape.causal:
            import decoder  # not at the top: it imports onnx-ir, and the processes that are measured import this file

            decoder.build_decoder(shape, graph, weights)
        else:
            write(weights, encoder_weights(shape))
            build_onnx(Checkpoint(weights, folder / "none", shape.layers, shape.heads, shape.hidden), graph, 2)
        prepared = folder / f"{bundle.name}.part"
        pz.prepare(graph, prepared, dtype=dtype, overwrite=True)
        if not shape.causal:
            fill_classifier(prepared / "weights.safetensors")
        prepared.rename(bundle)
    finally:
        graph.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
    return bundle


def normal(name: str, *size: int) -> Array:
    """Return random weights, a function of their name and size."""
    import pocketzo as pz

    z = pz.kernels.noise(prod(size), seed=0, tensor=zlib.crc32(name.encode()), draw=0)
    z *= np.float32(0.02)
    return z.reshape(size)


def fill_classifier(weights: Path) -> None:
    """Fill the classifier with random weights: with a head of zeros, every model of two classes has the same loss."""
    from pocketzo.formats.safetensors import DTYPES, read_header

    entry = read_header(weights)["classifier.weight"]
    with weights.open("r+b") as file:
        file.seek(entry.start)
        file.write(normal("classifier.weight", *entry.shape).astype(DTYPES[entry.dtype]).tobytes())


def encoder_weights(shape: Shape) -> Iterator[tuple[str, Array]]:
    h, i = shape.hidden, shape.intermediate
    tables = {"word_embeddings": shape.vocabulary, "position_embeddings": shape.positions, "token_type_embeddings": 2}
    dense = {f"attention.self.{x}": (h, h) for x in ("query", "key", "value")}
    dense |= {"attention.output.dense": (h, h), "intermediate.dense": (i, h), "output.dense": (h, i)}
    norms = ["embeddings.LayerNorm"]
    for table, rows in tables.items():
        yield f"embeddings.{table}.weight", normal(table, rows, h)
    for n in range(shape.layers):
        layer = f"encoder.layer.{n}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        for name, size in dense.items():
            yield f"{layer}.{name}.weight", normal(f"{layer}.{name}.weight", *size)
            yield f"{layer}.{name}.bias", normal(f"{layer}.{name}.bias", size[0])
    for name in norms:
        yield f"{name}.weight", np.ones(h, np.float32)
        yield f"{name}.bias", np.zeros(h, np.float32)


def make_batch(name: str, batch: int, tokens: int) -> dict[str, NDArray[np.int64]]:
    """Return random tokens without padding, and labels."""
    shape = SHAPES[name]
    rng = np.random.default_rng(1)
    ids = rng.integers(0, shape.vocabulary, (batch, tokens))
    inputs = {"input_ids": ids, "attention_mask": np.ones((batch, tokens), np.int64)}
    if shape.causal:
        return {**inputs, "labels": np.concatenate([ids[:, 1:], np.full((batch, 1), -100)], axis=1)}
    return {**inputs, "token_type_ids": np.zeros((batch, tokens), np.int64), "labels": rng.integers(0, 2, batch)}


def parameters(bundle: Path) -> int:
    """Return the number of elements of all weights."""
    from pocketzo.formats.safetensors import read_header

    return sum(prod(entry.shape) for entry in read_header(bundle / "weights.safetensors").values())


def activations(bundle: Path, batch: int, tokens: int) -> int:
    """Return the most bytes of intermediate tensors that are alive at once, by shape inference."""
    import onnx
    from onnx import shape_inference

    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.ClearField("dim_param")
            dim.dim_value = batch if axis == 0 else tokens
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    sizes = {
        value.name: prod(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        * onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
        for value in [*inferred.value_info, *inferred.output]
    }
    last = {name: i for i, node in enumerate(inferred.node) for name in node.input}
    alive = most = 0
    for i, node in enumerate(inferred.node):
        alive += sum(sizes.get(name, 0) for name in node.output)
        most = max(most, alive)
        alive -= sum(sizes.get(name, 0) for name in {*node.input, *node.output} if last.get(name, i) == i)
    return most
