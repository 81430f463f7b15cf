"""Every floating-point constant of a model is trained or counted, each once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import BERTS, MODELS, TIED, model_of, node, trainable_names, weight
from onnx import TensorProto, helper, numpy_helper

from pocketzo import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.frozen import elements_by_kind
from pocketzo.prepare import prepare

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.FLOAT8E4M3FN}
ONE = numpy_helper.from_array(np.array(1, np.float32), "one")


def constants(graph: onnx.GraphProto) -> Iterator[tuple[int, bytes]]:
    """Yield the size and content of each floating-point constant, in subgraphs too, read by onnx alone."""
    tensors = list(graph.initializer)
    for one in graph.node:
        for attribute in one.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from constants(attribute.g)
            elif one.op_type == "Constant" and attribute.name == "value":
                tensors.append(attribute.t)
            elif one.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                yield len(attribute.floats) or 1, np.array(helper.get_attribute_value(attribute), np.float32).tobytes()
    for tensor in tensors:
        if tensor.data_type in FLOATS:
            array = numpy_helper.to_array(tensor)
            yield array.size, array.tobytes()


def counted(bundle: Bundle) -> int:
    """Return how many numbers are trained or frozen."""
    trained = sum(int(np.prod(tensor.shape)) for tensor in bundle.tensors if tensor.trainable)
    return trained + sum(tensor.elements for tensor in bundle.frozen if "float" in tensor.dtype)


@pytest.mark.parametrize("train", ["all", r"layer\.1|h\.0|layers\.0"])
@pytest.mark.parametrize("name", [name for name in BERTS + TIED if "fresh" not in name and name != "mlm-new"])
def test_the_numbers_add_up(tmp_path: Path, name: str, train: str) -> None:
    model = onnx.load(MODELS / f"{name}.onnx")
    bundle = prepare(MODELS / f"{name}.onnx", tmp_path / "out", train=train)
    every = list(constants(model.graph))
    twice = 64 * 16 if sum(size == 64 * 16 for size, _ in every) > 1 and name in TIED else 0
    assert counted(bundle) == sum(size for size, _ in every) - twice
    names = [tensor.name for tensor in bundle.frozen]
    assert len(set(names)) == len(names)
    assert not trainable_names(bundle) & set(names)
    kinds = elements_by_kind(bundle.frozen)
    assert kinds.keys() <= {"constant", "request"}
    assert ("request" in kinds) == (train != "all")


def test_every_kind_adds_up(tmp_path: Path) -> None:
    """A weight, and one tensor of each kind that is none."""
    nodes = [
        node("Add", "fold.weight one", "shifted"),
        node("Mul", "x shifted", "a"),
        node("Add", "a mask", "b"),
        node("Clip", "b low", "c"),
        node("MatMul", "c fc.weight", "logits"),
    ]
    mask = numpy_helper.from_array(np.triu(np.full((4, 4), -1e9, np.float32)), "mask")
    low = numpy_helper.from_array(np.array(-10, np.float32), "low")
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [
            weight("fc.weight", 4, 3),
            weight("fold.weight", 4),
            weight("spare", 5, 5),
            weight("kept", 2, 3, dtype=np.float64),
            ONE,
            mask,
            low,
        ],
        inputs=[("x", TensorProto.FLOAT, (4, 4))],
        outputs=[("logits", (4, 3))],
    )
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("kept", TensorProto.DOUBLE, (2, 3)))
    onnx.save(model, path)
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight"}
    assert {tensor.name: (tensor.kind, tensor.dtype, tensor.elements) for tensor in bundle.frozen} == {
        "fold.weight": ("folded", "float32", 4),
        "spare": ("unused", "float32", 25),
        "kept": ("output", "float64", 6),
        "mask": ("buffer", "float32", 16),
        "low": ("constant", "float32", 1),
        "one": ("constant", "float32", 1),
    }
    assert counted(bundle) == sum(size for size, _ in constants(model.graph))
    assert Bundle.read(tmp_path / "out").frozen == bundle.frozen


def test_a_weight_of_another_type_beside_others(tmp_path: Path) -> None:
    nodes = [
        node("Cast", "x", "d", to=TensorProto.DOUBLE),
        node("Mul", "d scale.weight", "e"),
        node("Cast", "e", "f", to=TensorProto.FLOAT),
        node("MatMul", "f fc.weight", "logits"),
    ]
    tensors = [weight("fc.weight", 4, 3), weight("scale.weight", 4, dtype=np.float64)]
    path = model_of(tmp_path / "m.onnx", nodes, tensors)
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight"}
    assert [(tensor.name, tensor.kind, tensor.elements) for tensor in bundle.frozen] == [("scale.weight", "type", 4)]
    with pytest.raises(BundleError, match=r"'scale.weight'.*float64.*export the model in float32"):
        prepare(path, tmp_path / "other", train="weight")


def test_a_pattern_that_matches_what_is_no_weight(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x fc.weight", "y"), node("Mul", "y one", "logits")]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("fc.weight", 4, 3), ONE])
    with pytest.raises(BundleError, match=r"none of the 1 weights.*'fc.weight'; 'one' is frozen \(constant: a single"):
        prepare(path, tmp_path / "out", train="one")
    assert trainable_names(prepare(path, tmp_path / "out", train="one|fc")) == {"fc.weight"}
