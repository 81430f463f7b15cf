"""Small ONNX graphs, and what is done with them in more than one test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.session import open_plain

Array = npt.NDArray[Any]

MODELS = Path(__file__).parent / "models"
BERTS = ["bert-old", "bert-new", "bert-new-external", "bert-old-unfolded", "fresh-old", "fresh-new"]
TIED = ["mlm-old", "mlm-new", "gpt2-old", "gpt2-new", "opt-old"]


def inputs_of(name: str) -> dict[str, Array]:
    with np.load(MODELS / f"{name}.npz") as file:
        return {key.removeprefix("input."): np.array(file[key]) for key in file.files if key.startswith("input.")}


def labels_for(logits: Array) -> Array:
    shape = logits.shape[:-1]
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape) * 7 % np.int64(logits.shape[-1])


def run(path: Path, feed: dict[str, Array]) -> dict[str, Array]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


class Live:
    """A session as ``pz.load`` opens it over the plain layout, whose weights are arrays of this process."""

    def __init__(self, bundle: Bundle) -> None:
        loaded = safetensors.numpy.load_file(bundle.weights_path)
        self.weights = {tensor.name: np.array(loaded[tensor.name]) for tensor in bundle.tensors}
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.weights.items()}
        self.session = open_plain(bundle, self.values, 1)

    def outputs(self, feed: dict[str, Array]) -> list[Array]:
        return list(self.session.run(None, feed))

    def moved(self, before: list[Array], feed: dict[str, Array]) -> bool:
        return not all(np.array_equal(a, b) for a, b in zip(before, self.outputs(feed), strict=True))

    def dead(self, bundle: Bundle, feed: dict[str, Array]) -> list[str]:
        """Return the trainable tensors whose changes no output shows."""
        rng = np.random.default_rng(0)
        for array in self.weights.values():  # a fresh head is all zeros, behind which nothing shows
            array += rng.normal(0, 0.05, array.shape).astype(np.float32)
        before = self.outputs(feed)
        dead = []
        for tensor in bundle.tensors:
            if not tensor.trainable:
                continue
            array = self.weights[tensor.name]
            kept = array.copy()
            array += rng.normal(0, 0.5, array.shape).astype(np.float32)
            seen = self.moved(before, feed)
            if not seen:  # softmax takes no notice of a bias of the keys, which moves all scores of a row alike
                array[...] = np.nan
                seen = self.moved(before, feed)
            array[...] = kept
            if not seen:
                dead.append(tensor.name)
        for a, b in zip(before, self.outputs(feed), strict=True):
            np.testing.assert_array_equal(a, b)
        return dead


def weight(name: str, *shape: int, dtype: npt.DTypeLike = np.float32, seed: int = 0) -> TensorProto:
    values = np.random.default_rng([seed, *name.encode()]).normal(size=shape)
    return numpy_helper.from_array(values.astype(dtype), name)


def model_of(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Iterable[TensorProto],
    *,
    outputs: Sequence[tuple[str, Sequence[int | str]]] = (("logits", ("batch", 3)),),
    inputs: Sequence[tuple[str, int, Sequence[int | str]]] = (("x", TensorProto.FLOAT, ("batch", 4)),),
    opset: int = 17,
    ir_version: int = 8,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        list(weights),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version), path)
    return path


def node(op_type: str, inputs: str, output: str, name: str | None = None, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name or f"node_{output}", **attributes)


def linear(path: Path, **options: Any) -> Path:
    return model_of(path, [node("MatMul", "x fc.weight", "logits")], [weight("fc.weight", 4, 3)], **options)


def trainable_names(bundle: Bundle) -> set[str]:
    return {tensor.name for tensor in bundle.tensors if tensor.trainable}
