"""What was never learned is not trained, whatever its name; what was learned is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from graphs import Live, model_of, node, run, trainable_names, weight
from onnx import TensorProto, numpy_helper

from pocketzo.prepare import prepare

Array = npt.NDArray[Any]

RNG = np.random.default_rng(0)
INPUTS = [
    ("x", TensorProto.FLOAT, ("batch", "sequence", 8)),
    ("ids", TensorProto.INT64, ("batch", "sequence")),
    ("time", TensorProto.FLOAT, ("batch",)),
]
FEED: dict[str, Array] = {
    "x": RNG.normal(size=(2, 6, 8)).astype(np.float32),
    "ids": RNG.integers(0, 8, (2, 6)),
    "time": np.array([0.5, 3.0], np.float32),
}
HEAD = node("MatMul", "h fc.weight", "scores")
FREQUENCIES = np.array([1.0, 0.31, 0.02, 0.7])
"""In no order that a formula gives, as scaled rotary embeddings have them."""
INTEGERS = {
    "last": np.array([-1]),
    "middle": np.array([1]),
    "zero": np.array(0),
    "one": np.array(1),
    "n0": np.array([0]),
    "n1": np.array([1]),
    "eight": np.array([8]),
    "two": np.array([2]),
    "tail": np.array([1, 8]),
    "rest": np.array([4, 1]),
}


def angles(count: int) -> Array:
    half = np.arange(count)[:, None] * FREQUENCIES
    return np.concatenate([half, half], -1)


DISTANCES = abs(np.arange(24)[:, None] - np.arange(24))
ROTATE = [node("Mul", "x cos", "a"), node("Mul", "x sin", "b"), node("Add", "a b", "h"), HEAD]
ROTARY = [node("Concat", "half half", "angles", axis=-1), node("Cos", "angles", "cos"), node("Sin", "angles", "sin")]
AT = [node("Cast", "ids", "at", to=TensorProto.FLOAT), node("Unsqueeze", "at last", "column")]

BUFFERS: dict[str, tuple[Sequence[onnx.NodeProto], Mapping[str, Array]]] = {
    "frequencies times positions": (
        [*AT, node("Mul", "column p.weight", "half"), *ROTARY, *ROTATE],
        {"p.weight": FREQUENCIES},
    ),
    "a range of positions": (
        [
            node("Shape", "x", "shape"),
            node("Gather", "shape one", "length"),
            node("Range", "zero length one", "range"),
            node("Cast", "range", "at", to=TensorProto.FLOAT),
            node("Einsum", "at p.weight", "half", equation="s,d->sd"),
            *ROTARY,
            *ROTATE,
        ],
        {"p.weight": FREQUENCIES},
    ),
    "expanded frequencies from the left, scaled": (
        [
            node("Shape", "ids", "shape"),
            node("Slice", "shape n0 n1", "size"),
            node("Concat", "size rest", "target", axis=0),
            node("Expand", "p.weight target", "wide"),
            node("Cast", "ids", "at", to=TensorProto.FLOAT),
            node("Unsqueeze", "at middle", "row"),
            node("MatMul", "wide row", "turned"),
            node("Transpose", "turned", "quarter", perm=[0, 2, 1]),
            node("Mul", "quarter q.weight", "half"),
            *ROTARY,
            *ROTATE,
        ],
        {"p.weight": FREQUENCIES.reshape(1, 4, 1), "q.weight": np.array([1, 1, 0.5, 0.25])},
    ),
    "the time of a diffusion model": (
        [
            node("Unsqueeze", "time last", "column"),
            node("Mul", "column p.weight", "half"),
            node("Cos", "half", "cos"),
            node("Sin", "half", "sin"),
            node("Concat", "cos sin", "waves", axis=-1),
            node("Unsqueeze", "waves middle", "wave"),
            node("Add", "x wave", "h"),
            HEAD,
        ],
        {"p.weight": FREQUENCIES},
    ),
    "rotary tables, looked up": (
        [node("Gather", "c.weight ids", "cos"), node("Gather", "s.weight ids", "sin"), *ROTATE],
        {"c.weight": 1.2 * np.cos(angles(12)), "s.weight": 1.2 * np.sin(angles(12))},
    ),
    "sinusoidal positions with a row for padding": (
        [node("Gather", "p.weight ids", "p"), node("Add", "x p", "h"), HEAD],
        {"p.weight": np.insert(np.sin(angles(39) + np.repeat([0, np.pi / 2], 4)), 1, 0, axis=0)},
    ),
    "a bias by distance, sliced": (
        [
            node("Shape", "x", "shape"),
            node("Slice", "shape n1 two", "length"),
            node("Slice", "p.weight n0 length", "p"),
            node("Transpose", "x", "y", perm=[0, 2, 1]),
            node("MatMul", "x y", "s"),
            node("Slice", "p n0 length middle", "square"),
            node("Add", "s square", "t"),
            node("MatMul", "t x", "h"),
            HEAD,
        ],
        {"p.weight": -0.5 * DISTANCES},
    ),
    "a mask of zeros and ones": (
        [node("Gather", "p.weight ids", "p"), node("Mul", "x p", "h"), HEAD],
        {"p.weight": np.tril(np.ones((8, 8)))},
    ),
    "strides of an image's cells": (
        [
            node("Transpose", "x", "y", perm=[0, 2, 1]),
            node("Concat", "y y", "z", axis=1),
            node("Mul", "z p.weight", "a"),
            node("Slice", "a n0 eight middle", "b"),
            node("Transpose", "b", "h", perm=[0, 2, 1]),
            HEAD,
        ],
        {"p.weight": np.repeat([8.0, 16.0], 8)[:, None]},
    ),
    "a mask of large numbers": (
        [node("Gather", "p.weight ids", "p"), node("Add", "x p", "h"), HEAD],
        {"p.weight": np.triu(np.full((8, 8), -3e3))},
    ),
}

LEARNED: dict[str, tuple[Sequence[onnx.NodeProto], Mapping[str, Array]]] = {
    "positions": (
        [node("Gather", "p.weight ids", "p"), node("Add", "x p", "h"), HEAD],
        {"p.weight": RNG.normal(size=(16, 8))},
    ),
    "smooth positions": (  # as GPT-2's are
        [node("Gather", "p.weight ids", "p"), node("Add", "x p", "h"), HEAD],
        {"p.weight": np.sin(angles(64)) + 0.02 * RNG.normal(size=(64, 8))},
    ),
    "positions of zeros, as initialised": (
        [node("Gather", "p.weight ids", "p"), node("Add", "x p", "h"), HEAD],
        {"p.weight": np.zeros((16, 8))},
    ),
    "words, most of them never seen": (
        [node("Gather", "p.weight ids", "p"), node("Add", "x p", "h"), HEAD],
        {"p.weight": np.where(np.arange(64)[:, None] % 32 < 2, RNG.normal(size=(64, 8)), 0.125)},
    ),
    "sliced positions": (
        [
            node("Shape", "x", "shape"),
            node("Slice", "shape n1 two", "length"),
            node("Slice", "p.weight n0 length", "p"),
            node("Add", "x p", "h"),
            HEAD,
        ],
        {"p.weight": RNG.normal(size=(16, 8))},
    ),
    "scale and shift as initialised": (
        [node("LayerNormalization", "x p.weight p.bias", "h"), HEAD],
        {"p.weight": np.ones(8), "p.bias": np.zeros(8)},
    ),
    "a token before the others": (
        [
            node("Shape", "x", "shape"),
            node("Slice", "shape n0 n1", "size"),
            node("Concat", "size tail", "target", axis=0),
            node("Expand", "p.weight target", "tokens"),
            node("Concat", "tokens x", "h", axis=1),
            HEAD,
        ],
        {"p.weight": RNG.normal(size=(1, 1, 8))},
    ),
    "frequencies of time, learned": (
        [
            *AT,
            node("MatMul", "column p.weight", "product"),
            node("Add", "product p.bias", "phase"),
            node("Sin", "phase", "wave"),
            node("Add", "x wave", "h"),
            HEAD,
        ],
        {"p.weight": RNG.normal(size=(1, 8)), "p.bias": RNG.normal(size=8)},
    ),
    "waves of features": (
        [
            node("MatMul", "x p.weight", "half"),
            node("Cos", "half", "cos"),
            node("Sin", "half", "sin"),
            node("Concat", "cos sin", "h", axis=-1),
            HEAD,
        ],
        {"p.weight": RNG.normal(size=(8, 4))},
    ),
    "phases of words": (
        [
            node("Gather", "p.weight ids", "half"),
            node("Cos", "half", "cos"),
            node("Sin", "half", "sin"),
            node("Concat", "cos sin", "h", axis=-1),
            HEAD,
        ],
        {"p.weight": RNG.normal(size=(16, 4))},
    ),
    "a scale along another axis": (
        [
            node("Transpose", "x", "y", perm=[0, 2, 1]),
            node("Mul", "y p.weight", "z"),
            node("Transpose", "z", "h", perm=[0, 2, 1]),
            HEAD,
        ],
        {"p.weight": RNG.normal(size=(8, 1))},
    ),
    "one output": (
        [node("MatMul", "x one.weight", "y"), node("Add", "y p.bias", "z"), node("Add", "x z", "h"), HEAD],
        {"one.weight": RNG.normal(size=(8, 1)), "p.bias": np.array([0.5])},
    ),
}


def write(path: Path, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Array]) -> Path:
    read = {name for one in nodes for name in one.input}
    return model_of(
        path,
        nodes,
        [
            weight("fc.weight", 8, 3),
            *(numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()),
            *(numpy_helper.from_array(array, name) for name, array in INTEGERS.items() if name in read),
        ],
        inputs=[value for value in INPUTS if value[0] in read],
        outputs=[("scores", ("batch", "sequence", 3))],
    )


def check_function(path: Path, model: Path) -> dict[str, Array]:
    names = {value.name for value in onnx.load(path).graph.input}
    feed = {name: array for name, array in FEED.items() if name in names}
    np.testing.assert_allclose(run(model, feed)["scores"], run(path, feed)["scores"], rtol=1e-4, atol=1e-5)
    return feed


@pytest.mark.parametrize(("nodes", "constants"), BUFFERS.values(), ids=BUFFERS)
def test_buffers_are_frozen(tmp_path: Path, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Array]) -> None:
    path = write(tmp_path / "m.onnx", nodes, constants)
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight"}
    assert {(one.name, one.elements, one.kind) for one in bundle.frozen} == {
        (name, array.size, "buffer") for name, array in constants.items()
    }
    check_function(path, bundle.model_path)


@pytest.mark.parametrize(("nodes", "constants"), LEARNED.values(), ids=LEARNED)
def test_what_was_learned_is_trained(
    tmp_path: Path, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Array]
) -> None:
    path = write(tmp_path / "m.onnx", nodes, constants)
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight", *constants}
    assert bundle.frozen == ()
    assert Live(bundle).dead(bundle, check_function(path, bundle.model_path)) == []
